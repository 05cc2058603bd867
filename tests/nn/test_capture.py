"""On a GPU: a linear's forward and backward pass never wait for the device, and can be captured as a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from fp4dist.nn.clock import Clock
from fp4dist.nn.comm import NoComm
from fp4dist.nn.function import fp4_linear
from fp4dist.nn.plan import LinearPlan
from fp4dist.numerics import dequantize
from fp4dist.numerics.moment import Moment
from fp4dist.numerics.tensor import BlockScaledTensor, Carrier
from fp4dist.spec.load import load_recipe
from fp4dist.spec.run import BackendConfig
from tests.nn.one_linear import watch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
TOKENS, INPUTS, OUTPUTS = 512, 256, 384
RECIPES = ["nvidia_nvfp4", "quartet2", "quartet", "tetrajet"]


class Linear:
    """One bf16 linear under Megatron's protocol of gradients, with fixed places for all its tensors."""

    def __init__(self, recipe: str, config: BackendConfig | None = None, cache: bool = False) -> None:
        torch.manual_seed(0)
        clock, device = Clock(seed=7, step=3, micro_batch=5, cache_weights=cache), torch.device("cuda")
        linear = load_recipe(recipe).linears["fp4"]
        self.plan = LinearPlan.resolve("fc1", 99, linear, clock, device, config or BackendConfig())
        self.x = torch.randn(TOKENS, INPUTS, device=device, dtype=torch.bfloat16).requires_grad_()
        self.dy = torch.randn(TOKENS, OUTPUTS, device=device, dtype=torch.bfloat16)
        self.w = torch.randn(OUTPUTS, INPUTS, device=device, dtype=torch.bfloat16).requires_grad_()
        self.w.main_grad = torch.zeros(OUTPUTS, INPUTS, device=device)  # type: ignore[attr-defined]
        self.w.grad_added_to_main_grad = False  # type: ignore[attr-defined]

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """(y, dX, main_grad, which only grows)."""
        y = fp4_linear(self.x, self.w, self.plan, NoComm())
        (dx, _) = torch.autograd.grad(y, (self.x, self.w), self.dy)
        return y.detach(), dx, self.w.main_grad  # type: ignore[attr-defined]

    def outcome(self) -> list[Tensor]:
        """Copies of (y, dX, dW)."""
        self.w.main_grad.zero_()  # type: ignore[attr-defined]
        return [t.clone() for t in self.run()]


@contextmanager
def never_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_never_waits_for_the_device(recipe: str, cache: bool) -> None:
    linear = Linear(recipe, cache=cache)
    linear.run()  # compiles, and makes what is made once
    linear.plan.clock.step += 1
    with never_waiting():
        linear.run()
        linear.plan.clock.micro_batch += 1
        linear.run()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_captured_graph_gives_the_bits_of_eager_runs(recipe: str) -> None:
    """Each replay draws the noise of the time that the clock's moment shows, not that of its capture."""
    linear = Linear(recipe)
    clock = linear.plan.clock
    moment = clock.moment = Moment(torch.device("cuda"), clock.step, clock.micro_batch)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            linear.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear.run()
    clock.moment = None
    noises: list[Tensor] = []
    for seed in (1, 2, 3):
        torch.manual_seed(min(seed, 2))
        clock.step, clock.micro_batch = 10 + seed, 2**31 + seed
        moment.set(clock.step, clock.micro_batch)
        for tensor in (linear.x, linear.dy):
            tensor.data.copy_(torch.randn_like(tensor))
        linear.w.main_grad.zero_()  # type: ignore[attr-defined]
        graph.replay()
        replayed = [t.clone() for t in captured]
        for one, other in zip(replayed, linear.outcome(), strict=True):
            assert torch.equal(one, other)
        noises.append(replayed[1])
    assert not torch.equal(noises[1], noises[2]), "the same input at another time"


def values(operand: BlockScaledTensor | Carrier) -> Tensor:
    """[R, C] fp32 of codes or of a carrier."""
    if isinstance(operand, BlockScaledTensor):
        return dequantize(operand)
    rows = operand.rows if operand.rows is not None else 1.0
    return operand.values.float() * operand.scale * rows * operand.rotation**-0.5


@pytest.mark.parametrize("recipe", RECIPES)
def test_operands_are_those_of_the_reference(recipe: str) -> None:
    """All six, as the GEMMs get them; results agree as sums in another order do."""
    fast = Linear(recipe)
    slow = Linear(recipe, BackendConfig(kind="reference", allow_reference=True))
    seen, expected = watch(fast.plan), watch(slow.plan)
    for one, other in zip(fast.outcome(), slow.outcome(), strict=True):
        torch.testing.assert_close(one, other, rtol=2**-6, atol=float(other.abs().max()) * 2**-8)
    for slot, operand in expected.operands.items():
        found = seen.operands[slot]
        assert not isinstance(found, Tensor)
        assert isinstance(operand, BlockScaledTensor)
        assert isinstance(found, Carrier), slot
        torch.testing.assert_close(values(found), values(operand), rtol=2**-22, atol=0.0)
