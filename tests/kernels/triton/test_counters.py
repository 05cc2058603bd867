"""Counters are zero, apart from each other, and those of a CUDA graph are its own."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fp4dist.kernels.triton import counters
from fp4dist.kernels.triton.counters import WORDS, recorded, zeroed
from fp4dist.kernels.triton.quantize import _constant as constant

CPU = torch.device("cpu")


def test_no_counter_is_given_twice() -> None:
    given = [zeroed(CPU) for _ in range(3 * counters._COUNTERS // 2)]
    assert len({t.data_ptr() for t in given}) == len(given)
    for i, counter in enumerate(given):
        assert counter.tolist() == [0] * WORDS
        assert counter.data_ptr() % 32 == given[0].data_ptr() % 32
        counter.fill_(i + 1)


def test_a_graph_has_blocks_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a stream that records: what was cleared before would not be cleared by a replay."""
    device = torch.device("cuda")
    zeros = torch.zeros
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 5, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))
    monkeypatch.setattr(counters._counters, "left", {})
    capturing = False
    eager = zeroed(device)
    capturing = True
    graphs = []
    for _ in range(2):
        with recorded():
            graphs.append([zeroed(device) for _ in range(4)])
    first, second = ({t.untyped_storage().data_ptr() for t in graph} for graph in graphs)
    assert len(first) == len(second) == 1
    assert len(first | second | {eager.untyped_storage().data_ptr()}) == 3
    alone = zeroed(device)
    assert alone.untyped_storage().nbytes() == 4 * WORDS, "nothing to share in a graph that nobody announced"
    capturing = False
    assert zeroed(device).untyped_storage().data_ptr() == eager.untyped_storage().data_ptr()


def test_what_outlives_an_evaluation_can_be_kept_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd refuses to save a tensor that was made in inference mode."""
    for blocks in (counters._counters, counters._numbers, counters._factors):
        monkeypatch.setattr(blocks, "left", {})
    constant.cache_clear()
    with torch.inference_mode():
        made = [zeroed(CPU), counters.zero(CPU), counters.unset(CPU), constant(1.0, CPU)]
    assert not any(t.is_inference() for t in made)
