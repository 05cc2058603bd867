"""An amax that comes with a tensor is taken for that tensor and for nothing else."""

from __future__ import annotations

import pytest
import torch

from fp4dist.numerics.handed import hand_over, handed


def test_an_amax_holds_for_the_tensor_and_views_of_all_its_elements() -> None:
    x = torch.randn(4, 2, 8)
    amax = x.abs().amax()
    assert hand_over(x, amax) is x
    for same in (x, x.flatten(0, -2), x.flatten(0, -2).t()):
        assert handed(same) is amax
    for other in (x[:2], x.clone(), x + 0, x.to(torch.bfloat16), torch.randn(4, 2, 8)):
        assert handed(other) is None


def test_a_write_forgets_it() -> None:
    x = torch.randn(4, 8)
    view = x.t()
    hand_over(x, x.abs().amax())
    view[0, 0] = 100.0  # a view writes into the same memory
    assert handed(x) is None
    assert handed(view) is None
    hand_over(x, x.abs().amax())
    assert handed(view) is not None


@pytest.mark.parametrize("amax", [torch.ones(1), torch.ones((), dtype=torch.bfloat16)])
def test_another_form_is_refused(amax: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="an amax is"):
        hand_over(torch.ones(4), amax)


def test_it_passes_through_autograd() -> None:
    """What a Function's forward gets is the tensor that was handed over, what its backward gets the gradient."""
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            seen.append(handed(x.flatten(0, -2)))
            return x * 2

        @staticmethod
        def backward(ctx, dy):  # type: ignore[no-untyped-def]
            seen.append(handed(dy.flatten(0, -2)))
            return dy * 2

    x, dy = torch.randn(4, 2, 8, requires_grad=True), torch.randn(4, 2, 8)
    hand_over(x, x.detach().abs().amax())
    hand_over(dy, dy.abs().amax())
    Look.apply(x).backward(dy)
    assert [amax is not None for amax in seen] == [True, True]


def test_a_view_of_all_elements_hands_over_for_its_kin() -> None:
    """A norm's output is a view of the rows that its kernel wrote, and its quantizer gets rows again."""
    rows = torch.randn(6, 8)
    y = rows.view(3, 2, 8)
    hand_over(y, rows.abs().amax())
    assert handed(y.flatten(0, -2)) is not None
    assert handed(rows[:3]) is None
    rows[0, 0] = 9
    assert handed(y) is None
