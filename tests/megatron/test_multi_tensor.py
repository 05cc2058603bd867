"""Gradient norm and clipping by torch's foreach functions: what Megatron-core's fallback computes, in its place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp4dist.megatron import multi_tensor
from fp4dist.megatron.multi_tensor import foreach_norm, foreach_scale, use_foreach
from fp4dist.megatron.upstream import MEGATRON_VERSION


def gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((3, 5), (7,), (), (1024,))]


def test_norm_of_all_tensors_together() -> None:
    grads = gradients()
    norm, each = foreach_norm(65536, None, [grads], False)
    assert norm.shape == (1,)
    assert norm.dtype == torch.float32
    assert each is None
    assert norm.item() == pytest.approx(float(torch.cat([g.double().flatten() for g in grads]).norm()), rel=1e-6)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_norm_of_what_is_not_finite_is_not(bad: float) -> None:
    grads = gradients()
    grads[1][3] = bad
    assert not foreach_norm(65536, None, [grads], False)[0].isfinite()


def test_scale_has_the_fallbacks_bits() -> None:
    from megatron.core.utils import local_multi_tensor_scale

    expected, in_place, source = gradients(), gradients(), gradients()
    local_multi_tensor_scale(65536, None, [expected, expected], 0.3)
    foreach_scale(65536, None, [in_place, in_place], 0.3)
    target = [torch.zeros_like(g) for g in source]
    foreach_scale(65536, None, [source, target], 0.3)
    for wanted, one, other, kept, before in zip(expected, in_place, target, source, gradients(), strict=True):
        assert torch.equal(wanted, one)
        assert torch.equal(wanted, other)
        assert torch.equal(kept, before)


def test_replaces_only_the_fallbacks_and_only_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nothing; on a GPU what Megatron-core fell back to; kernels of apex or Transformer Engine stay."""
    from megatron.core.optimizer import clip_grads

    names = list(multi_tensor._FALLBACKS)
    for name in names:
        monkeypatch.setattr(clip_grads, name, getattr(clip_grads, name))  # put back at the end
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert use_foreach() == ()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert use_foreach() == tuple(names), f"megatron-core {MEGATRON_VERSION} has other fallbacks"
    assert clip_grads.l2_norm_impl is foreach_norm
    assert clip_grads.multi_tensor_scale_impl is foreach_scale
    assert use_foreach() == ()
