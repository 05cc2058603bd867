"""What norms and SwiGLU hand over is the amax of the very tensor that a quantizer gets, or nothing is."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fp4dist.megatron import fusions, producers
from fp4dist.megatron.fusions import Fusions
from fp4dist.megatron.upstream import MEGATRON_VERSION
from fp4dist.numerics.handed import handed
from fp4dist.spec.load import load_recipe
from tests.distributed import megatron_groups, run_ranks
from tests.megatron.test_fusions import compare, made
from tests.megatron.tiny import loss_of, tiny_run

WITH_AMAX = Fusions(norm=True, rope=True, loss=True, amax=True)
# (tensor-parallel ranks, sequence parallelism) -> (linear, slot) of which the amax is handed over, in every layer
ALONE = {
    ("linear_qkv", "fprop.x"), ("linear_fc1", "fprop.x"), ("linear_fc2", "fprop.x"), ("linear_fc1", "dgrad.dy"),
    ("linear_proj", "dgrad.dy"), ("linear_fc2", "dgrad.dy"),
}  # fmt: skip


def largest(x: Tensor) -> Tensor:
    return x.detach().abs().amax().float()


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or bool(a.isnan() & b.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_norm_and_swiglu_give_the_amax_of_what_they_write(dtype: torch.dtype, value: float) -> None:
    x = made(6, 3, 64).to(dtype)
    x[2, 1, 5] += value
    y, _ = producers.normalized(x.requires_grad_(), torch.ones(64, dtype=dtype), 1e-5)
    z = producers.gated(y)
    for found in (y, z):
        amax = handed(found.flatten(0, -2))
        assert amax is not None
        assert same(amax, largest(found))
        assert amax.data_ptr() % 16 == 0


def test_gradients_bring_their_amax() -> None:
    """That of x has the residual's gradient in it already."""
    seen: list[Tensor] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
            amax = handed(dy)
            assert amax is not None
            assert same(amax, largest(dy))
            seen.append(dy)
            return dy

    x = made(6, 3, 64).bfloat16().requires_grad_()
    y, residual = producers.normalized(Look.apply(x), torch.ones(64, dtype=torch.bfloat16), 1e-5)
    (producers.gated(Look.apply(y)).sum() + residual.square().sum()).backward()
    assert len(seen) == 2


def test_an_amax_is_lost_where_gradients_are_added_up() -> None:
    """Two uses: autograd adds the second gradient to the first, perhaps in its memory."""
    found: list[bool] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
            amax = handed(dy)
            found.append(amax is None or same(amax, largest(dy)))
            return dy

    for order in (0, 1):
        x = Look.apply(made(6, 3, 64).bfloat16().requires_grad_())
        uses = [producers.normalized(x, torch.ones(64, dtype=torch.bfloat16), 1e-5)[0], x * 100]
        (uses[order].sum() + uses[1 - order].square().sum()).backward()
    assert found == [True, True]


def test_swiglu_is_torchs() -> None:
    def plain(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    compare(producers.gated, plain, [made(5, 3, 64)], "cpu")


@pytest.mark.distributed
def test_quantizers_of_a_whole_model_get_true_amaxes() -> None:
    """In every layout each amax that arrives is that of this rank's tensor; which do arrive."""
    for found in run_ranks(arrivals, 2):
        assert found["wrong"] == []
        # before Megatron's 0.17 autograd adds the residual's gradient to the norm's: another tensor
        expected = ALONE if MEGATRON_VERSION >= (0, 17) else ALONE - {("linear_proj", "dgrad.dy")}
        assert found["1 alone"] == expected
        assert found["2 split"] == expected
        assert found["2 sequence"] >= {("linear_fc2", "fprop.x"), ("linear_fc1", "dgrad.dy")}


def arrivals() -> dict[str, Any]:
    from fp4dist.megatron import apply, build_gpt

    result: dict[str, Any] = {"wrong": []}
    recipe = load_recipe("nvidia_nvfp4")
    recipe = replace(recipe, rules=(replace(recipe.rules[-1]),))
    for name, tp, sequence in (("1 alone", 1, False), ("2 split", 2, False), ("2 sequence", 2, True)):
        for chosen in (WITH_AMAX, replace(WITH_AMAX, amax=False)):
            arrived: Counter[tuple[str, str]] = Counter()
            with megatron_groups(tp), pytest.MonkeyPatch.context() as patch:
                patch.setattr(fusions, "choose", lambda _, chosen=chosen: chosen)
                config = tiny_run(tp, sequence_parallel=sequence, hidden_size=128, ffn_hidden_size=256)
                gpt = build_gpt(config, torch.bfloat16)
                applied = apply(gpt, recipe, tokens=64)
                for target in applied.targets:
                    look_at(target.module.plan, arrived, result["wrong"])
                loss_of(gpt).backward()
            if chosen.amax:
                result[name] = set(arrived)
            else:
                assert not arrived
    return result


def look_at(plan: Any, arrived: Counter[tuple[str, str]], wrong: list[str]) -> None:
    """Compare what comes with each operand's source with what is there."""
    if plan is None:
        return

    def around(slot: str, kernel: Any) -> Any:
        def quantize(source: Any, *args: Any, **named: Any) -> Any:
            amax = handed(source) if isinstance(source, Tensor) else None
            if amax is not None and slot in ("fprop.x", "dgrad.dy"):
                arrived[plan.path.rsplit(".", 1)[-1], slot] += 1
                if not same(amax, largest(source)):
                    wrong.append(f"{plan.path} {slot}")
            return kernel.fn(source, *args, **named)

        return replace(kernel, fn=quantize)

    plan.kernels = {name: around(name, k) if k.op == "quantize" else k for name, k in plan.kernels.items()}
