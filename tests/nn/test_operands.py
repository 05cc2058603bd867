"""What is counted of operands, against counts made by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import fp4dist
from fp4dist.nn.operands import OperandWatch, first_columns, first_rows, largest
from fp4dist.numerics.quantize import dequantize, quantize
from fp4dist.numerics.tensor import Key
from fp4dist.spec.build import build
from fp4dist.spec.load import load_recipe
from fp4dist.spec.operand import QuantSpec
from fp4dist.spec.recipe import SLOTS

PATH = "layers.0.linear_fc1"
ALL = ("nvidia_nvfp4", "quartet2", "quartet", "tetrajet_v2", "wang2501", "mxfp4_h32", "averis", "luq")


def one_layer(recipe: str, tokens: int = 256) -> tuple[nn.Module, fp4dist.AppliedRecipe, Tensor]:
    torch.manual_seed(0)
    layers = [nn.ModuleDict({"linear_fc1": nn.Linear(256, 256, bias=False)}) for _ in range(2)]
    model = nn.ModuleDict({"layers": nn.ModuleList(layers)})  # the second is some recipes' last layer, in bf16
    applied = fp4dist.apply_recipe(model, recipe, tokens=tokens)
    applied.set_step(0, 10)
    return model, applied, torch.randn(tokens, 256, requires_grad=True)


def linear_of(model: nn.Module) -> nn.Linear:
    found = model.get_submodule(PATH)
    assert isinstance(found, nn.Linear)
    return found


def run(model: nn.Module, x: Tensor) -> Tensor:
    y = linear_of(model)(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    gradient = linear_of(model).weight.grad
    assert gradient is not None
    return torch.cat([y.detach().flatten(), gradient.flatten()])


@pytest.mark.parametrize("recipe", ALL)
def test_watching_changes_no_bit_and_counts_every_quantized_slot(recipe: str) -> None:
    model, applied, x = one_layer(recipe)
    before = run(model, x)
    model.zero_grad()
    watch = OperandWatch(applied, rows=128)
    linear = applied.rows[0].recipe
    with applied.aside(), watch.watching():
        watched = run(model, x)
    assert torch.equal(before, watched)
    found = {slot for _, slot in watch.read()}
    reused = {s for s in SLOTS if (spec := linear.slot(s)) is not None and spec.source == "reuse"}
    assert found == {s for s in SLOTS if linear.slot(s) is not None} - reused
    for operand in watch.read().values():
        assert 0 <= operand.underflow < 0.5
        assert 0 <= operand.saturation < 0.2
        assert 10 < operand.qsnr < 60
        assert operand.amax > 0
    assert 0 <= watch.zero_gradients()[PATH] < 1e-3


def test_counts_are_those_made_by_hand() -> None:
    """Codes, zeros and errors of the forward input on all rows."""
    model, applied, x = one_layer("nvidia_nvfp4")
    with torch.no_grad():
        x[:, 16] = 300.0  # its blocks lose their small values
        x[:, 32:48] = 0.0  # zeros are not lost
    watch = OperandWatch(applied, rows=256)
    with applied.aside(), watch.watching():
        run(model, x)
    found = watch.read()[PATH, "fprop.x"]
    spec = load_recipe("nvidia_nvfp4").linear("fp4").fprop.x
    assert spec is not None
    q = dequantize(quantize(x.detach(), spec))
    assert found.underflow == pytest.approx(((q == 0) & (x != 0)).float().mean().item())
    assert found.underflow > 0.05
    ratio = x.square().sum().item() / (x - q).square().sum().item()
    assert found.qsnr == pytest.approx(10 * math.log10(ratio), abs=1e-4)
    assert found.amax == 300.0


def test_saturation_is_seen_where_a_rule_clips() -> None:
    """MXFP4 scales rounded down clip what lies above 6 of their steps; rounded up they never do."""
    torch.manual_seed(0)
    x = torch.full((128, 128), 0.1)
    x[:, ::32] = 7.9  # floor(log2) - 2: a step of 1, top 6
    for kind, expected in (("floor", 1 / 32), ("ceil", 0.0)):
        spec = build(QuantSpec, {"format": "mxfp4", "scale": {"kind": kind}})
        q = quantize(x, spec)
        assert (x.abs() > largest(q) * (1 + 2**-10)).float().mean().item() == expected


def test_cut_codes_are_the_first_values() -> None:
    x = torch.randn(256, 256)
    for name in ("nvidia_nvfp4", "mxfp4_h32"):
        for spec in (load_recipe(name).linear("fp4").fprop.x, load_recipe(name).linear("fp4").fprop.w):
            assert spec is not None
            q = quantize(x, spec, Key(0, 0, 0, 0, 0))
            whole = dequantize(q)
            assert torch.equal(dequantize(first_rows(q, 140)), whole[: 140 // q.block[0] * q.block[0]])
            assert torch.equal(dequantize(first_columns(q, 128)), whole[:, :128])


def test_zero_gradients_are_counted() -> None:
    model, applied, x = one_layer("nvidia_nvfp4")
    with torch.no_grad():
        x[:, :64] = 0.0  # a quarter of dW's columns
    watch = OperandWatch(applied, rows=128)
    with applied.aside(), watch.watching():
        linear_of(model)(x).sum().backward()
    grad = linear_of(model).weight.grad
    assert grad is not None
    assert watch.zero_gradients()[PATH] == (grad == 0).float().mean().item() >= 0.25
