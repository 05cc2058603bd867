"""NaN triage names the place where a value went wrong, and leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fp4dist.nn.apply import AppliedRecipe, apply_recipe
from fp4dist.nn.triage import Finding, Triage, triage
from tests.distributed import run_ranks
from tests.tiny_llama import TinyLlama, make_tokens

INF = float("inf")
UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"
RECIPES = ("quartet2", "nvidia_nvfp4", "bf16")


def make(recipe: str = "quartet2", layers: int = 2) -> tuple[TinyLlama, AppliedRecipe]:
    model = TinyLlama(layers)
    applied = apply_recipe(model, recipe, seed=3)
    applied.set_step(7, 10, micro_batch=4)
    return model, applied


def run(model: nn.Module, applied: AppliedRecipe) -> Triage:
    with triage(model, clock=applied.clock) as found:
        model(make_tokens()).backward()
    return found


def poke(tensor: Tensor, value: float) -> Tensor:
    """The tensor with one element replaced; gradients pass."""
    hit = torch.zeros_like(tensor, dtype=torch.bool)
    hit.view(-1)[5] = True
    return torch.where(hit, torch.full_like(tensor, value), tensor)


def known(finding: Finding | None) -> Finding:
    assert finding is not None
    return finding


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_healthy_model(recipe: str) -> None:
    """Nothing found, the bits of a run without triage, and no hook or kernel left."""
    (model, applied), (twin, plain) = make(recipe), make(recipe)
    kernels = [target.module.plan.kernels for target in applied.targets if target.module.plan]
    found = run(model, applied)
    assert not found
    assert min(found.checked.values()) > 50
    assert (
        found.report().splitlines()[0] == f"forward: everything finite ({found.checked['forward']} tensors looked at)"
    )
    assert found.to_json() == {"forward": None, "backward": None}
    twin(make_tokens()).backward()
    plain.check_counts()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)
    assert applied.counts() == plain.counts()
    after = [target.module.plan.kernels for target in applied.targets if target.module.plan]
    assert all(a is b for a, b in zip(after, kernels, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_broken_weight(recipe: str) -> None:
    model, applied = make(recipe)
    with torch.no_grad():
        model.get_parameter(f"{UP}.weight")[3, 4] = -INF
        model.get_parameter(f"{UP}.weight")[5, 6] = float("nan")
    found = run(model, applied)
    finding = known(found.forward)
    assert (finding.path, finding.what, finding.name) == (UP, "weight", "")
    assert (finding.nans, finding.infs, finding.size, finding.shape) == (1, 1, 256 * 128, (256, 128))
    assert (finding.step, finding.micro_batch, finding.rank, finding.dtype) == (7, 4, 0, "float32")
    assert 0 < finding.amax["weight"] < 1
    quantized = recipe == "quartet2"  # nvidia_nvfp4 leaves the last of two layers in bf16
    assert (finding.module, finding.slot) == (("Fp4Linear", "fprop.w") if quantized else ("Linear", ""))
    assert finding.spec == ("nvfp4 1x16 4/6" if quantized else "")
    assert finding.before.startswith(f"input of {UP}, amax ")
    text = found.report()
    assert text.startswith(f"forward: weight of {UP} ({finding.module}) is not finite, step 7, micro-batch 4, rank 0\n")
    assert "    1 NaN and 1 Inf of 32768 values, float32 [256, 128]" in text
    assert json.loads(json.dumps(found.to_json()))["forward"]["path"] == UP


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_broken_activation_between_modules(recipe: str) -> None:
    """Nothing but a functional op made it: the next module's input, and the last finite value before."""
    model, applied = make(recipe)
    mlp: Any = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(poke(nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x), INF))
    finding = known(run(model, applied).forward)
    assert (finding.path, finding.what, finding.infs) == (DOWN, "input", 1)
    assert finding.before.startswith(f"output of {UP}, amax ")


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_output_that_overflows(recipe: str) -> None:
    """Finite operands, a product that is not: the culprit is the GEMM, and the operands' sizes say why."""
    model, applied = make(recipe)
    with torch.no_grad():
        model.get_parameter(f"{UP}.weight").fill_(3e38)
    finding = known(run(model, applied).forward)
    assert (finding.path, finding.what) == (UP, "output")
    assert finding.infs > 0
    assert finding.amax["weight"] == pytest.approx(3e38)
    assert 0 < finding.amax["input"] < 100
    assert finding.slot == ("fprop" if recipe == "quartet2" else "")


def broken_gradient(model: TinyLlama, path: str) -> None:
    """From now on the gradient that comes back to `path` has one Inf."""
    model.get_submodule(path).register_forward_hook(lambda m, args, y: Exchanged.apply(y, broken))


class Exchanged(torch.autograd.Function):
    """Identity forward; backward gives what `change` makes of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.change(dy), None


def broken(dy: Tensor) -> Tensor:
    return poke(dy, INF)


def large(dy: Tensor) -> Tensor:
    return torch.full_like(dy, 1e10)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_broken_gradient(recipe: str) -> None:
    """It arises behind up_proj, whose output the next module does not take as it is."""
    model, applied = make(recipe)
    broken_gradient(model, UP)
    found = run(model, applied)
    assert found.forward is None
    finding = known(found.backward)
    assert (finding.path, finding.what, finding.infs) == (UP, "grad_output", 1)
    assert (finding.step, finding.micro_batch) == (7, 4)
    assert finding.slot == ("dgrad.dy" if recipe == "quartet2" else "")
    assert set(finding.amax) == {"input", "weight", "output", "grad_output"}
    assert found.report().splitlines()[0].startswith("forward: everything finite")


def test_a_gradient_that_a_gemm_makes() -> None:
    """Finite dY and W, but dX overflows: found at the kernel, not as a sum over the three consumers of the input."""
    model, applied = make()
    with torch.no_grad():
        model.get_parameter(f"{UP}.weight").fill_(1e30)
        model.get_submodule("model.layers.1.post_attention_layernorm").weight.mul_(1e-30)  # type: ignore[operator]
    model.get_submodule(UP).register_forward_hook(lambda m, args, y: Exchanged.apply(y, large))
    finding = known(run(model, applied).backward)
    assert (finding.path, finding.what, finding.slot, finding.spec) == (UP, "grad_input", "dgrad", "fp4")
    assert finding.amax["weight"] == pytest.approx(1e30)
    assert 1e5 < finding.amax["grad_output"] < INF


@pytest.mark.parametrize("recipe", ["quartet2", "bf16"])
def test_a_weight_gradient_that_only_the_sum_breaks(recipe: str) -> None:
    """A finite dX, but dW is not: the weight gradient itself is named."""
    model, applied = make(recipe)
    linear: Any = model.get_submodule(DOWN)
    with torch.no_grad():
        linear.weight.mul_(1e-30)  # keeps y and dX small
    down = type(linear).forward
    linear.forward = lambda x: Exchanged.apply(down(linear, x * 1e30), large)  # dW = dY^T (1e30 x): beyond fp32
    finding = known(run(model, applied).backward)
    assert (finding.path, finding.what) == (DOWN, "weight gradient")
    assert finding.slot == ("wgrad" if recipe == "quartet2" else "")


def test_a_gradient_in_megatrons_buffer() -> None:
    """There the hook's gradient is a zero that stands in; `main_grad` is looked at as well."""
    model, applied = make("bf16")
    weight: Any = model.get_parameter(f"{UP}.weight")
    weight.main_grad = torch.full_like(weight, INF)
    finding = known(run(model, applied).backward)
    assert (finding.path, finding.what, finding.name) == (UP, "weight gradient", "weight.main_grad")
    fp4, applied = make()
    weight = fp4.get_parameter(f"{UP}.weight")
    weight.main_grad, weight.grad_added_to_main_grad = torch.full_like(weight, INF), False
    assert known(run(fp4, applied).backward).name == "weight.main_grad"


def recomputing(model: TinyLlama, *, reentrant: bool) -> nn.Module:
    for layer in model.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=reentrant)  # type: ignore[method-assign]
    return model


WRAPS: dict[str, Callable[[TinyLlama], nn.Module]] = {
    "checkpoint": partial(recomputing, reentrant=False),
    "reentrant": partial(recomputing, reentrant=True),
    "compiled": lambda model: torch.compile(model, backend="eager"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_wrapped_models(wrap: str) -> None:
    """Recomputation and a compiled model (which then runs uncompiled) give the same findings."""
    torch.compiler.reset()
    model, applied = make()
    wrapped = WRAPS[wrap](model)
    if wrap == "compiled":
        wrapped(make_tokens()).backward()  # compiled code exists before the hooks do
    broken_gradient(model, UP)
    finding = known(run(wrapped, applied).backward)
    assert (finding.path, finding.what) == (UP, "grad_output")
    with torch.no_grad():
        model.get_parameter(f"{DOWN}.weight")[0, 0] = INF
    finding = known(run(wrapped, applied).forward)
    assert (finding.path, finding.what) == (DOWN, "weight")


def test_an_exception_inside_leaves_nothing_behind() -> None:
    model, applied = make()
    kernels = applied.targets[0].module.plan.kernels  # type: ignore[union-attr]

    def fail() -> None:
        with triage(model):
            assert model.get_submodule(UP)._forward_hooks
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not model.get_submodule(UP)._forward_hooks
    assert applied.targets[0].module.plan.kernels is kernels  # type: ignore[union-attr]


def test_chunks_of_a_stage_have_global_layer_numbers() -> None:
    first, second = TinyLlama(1), TinyLlama(1)
    with torch.no_grad():
        second.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = INF
    with triage([first, second], layer_offset=[2, 3]) as found:
        second(make_tokens())
    assert known(found.forward).path == "model.layers.3.mlp.up_proj"


def sharded() -> list[Any]:
    """FSDP2: hooks see the gathered weights, and each rank its own data."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    model, applied = make()
    for unit in (*model.model.layers, model):
        fully_shard(unit, mesh=mesh)
    if dist.get_rank() == 1:
        broken_gradient(model, UP)
    found = run(model, applied)
    healthy = found.forward is None
    return [healthy, found.backward and (found.backward.path, found.backward.what, found.backward.rank)]


@pytest.mark.distributed
def test_fsdp() -> None:
    """The rank that broke it knows where; the other sees what the reduction spreads only after its own gradients."""
    first, second = run_ranks(sharded, 2)
    assert second == [True, (UP, "grad_output", 1)]
    assert first == [True, None]
