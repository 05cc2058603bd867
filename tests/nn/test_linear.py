"""Fp4Linear is torch.nn.Linear with a plan: same parameters, same hooks, same results without one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fp4dist.nn.function import fp4_linear
from fp4dist.nn.linear import Fp4Linear
from fp4dist.spec.load import load_recipe
from tests.generators import normal
from tests.nn.one_linear import make_plan

QUARTET2 = load_recipe("quartet2").linears["fp4"]


def make_linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 128, bias=bias)


@pytest.mark.parametrize("bias", [False, True])
def test_without_a_plan_it_is_torch(bias: bool) -> None:
    linear, x = make_linear(bias), normal(128, 64)
    ours = Fp4Linear.of(linear)
    assert torch.equal(ours(x), linear(x))
    assert ours.global_features() == (64, 128)
    torch.manual_seed(0)
    assert torch.equal(Fp4Linear(64, 128, bias=bias).weight, linear.weight)


def test_parameters_are_shared_and_optimizers_keep_working() -> None:
    linear = make_linear()
    optimizer = torch.optim.SGD(linear.parameters(), lr=1.0)
    ours = Fp4Linear.of(linear)
    assert ours.weight is linear.weight
    assert ours.bias is linear.bias
    assert list(ours.state_dict()) == list(linear.state_dict())
    assert repr(ours) == "Fp4Linear(in_features=64, out_features=128, bias=True)"
    ours.set_plan(make_plan(QUARTET2))
    before = linear.weight.detach().clone()
    ours(normal(128, 64)).sum().backward()
    optimizer.step()
    assert not torch.equal(ours.weight, before)
    ours.load_state_dict({"weight": before, "bias": linear.bias.detach()})
    assert torch.equal(linear.weight, before)


def test_mode_hooks_and_device_are_kept() -> None:
    linear = make_linear().eval()
    seen: list[str] = []
    linear.register_forward_hook(lambda *_: seen.append("hook"))
    ours = Fp4Linear.of(linear)
    assert not ours.training
    ours(normal(2, 64))
    assert seen == ["hook"]
    ours.register_forward_hook(lambda *_: seen.append("new"))
    linear(normal(2, 64))
    assert seen == ["hook", "hook"]  # what is added later belongs to one of the two
    with torch.device("meta"):
        assert Fp4Linear.of(nn.Linear(16, 16)).weight.is_meta


def test_with_a_plan_the_bias_is_added_in_the_dtype_of_x() -> None:
    x = normal(128, 64)
    for dtype in (torch.float32, torch.bfloat16):
        ours = Fp4Linear.of(make_linear())
        ours.set_plan(make_plan(QUARTET2))
        y = ours(x.to(dtype))
        expected = fp4_linear(x.to(dtype), ours.weight, make_plan(QUARTET2), ours.comm) + ours.bias.to(dtype)
        assert y.dtype == dtype
        assert torch.equal(y, expected)


def test_a_plan_can_be_taken_away() -> None:
    linear, x = make_linear(), normal(128, 64)
    ours = Fp4Linear.of(linear)
    ours.set_plan(make_plan(QUARTET2))
    assert not torch.equal(ours(x), linear(x))
    ours.set_plan(None)
    assert torch.equal(ours(x), linear(x))


def test_autocast_decides_the_dtype_as_for_torch() -> None:
    linear, x = make_linear(), normal(128, 64)
    ours = Fp4Linear.of(linear)
    ours.set_plan(make_plan(QUARTET2))

    def run(module: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x)

    assert run(ours).dtype == run(linear).dtype == torch.bfloat16
    run(ours).float().sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.dtype == torch.float32


def test_a_copy_has_its_own_parameters() -> None:
    ours = Fp4Linear.of(make_linear())
    ours.set_plan(make_plan(QUARTET2))
    twin = copy.deepcopy(ours)
    assert twin.weight is not ours.weight
    assert torch.equal(twin(normal(128, 64)), ours(normal(128, 64)))
