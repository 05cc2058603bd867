"""The codec's kernels are valid Triton: types and shapes for an sm_90, which the interpreter cannot see."""

from __future__ import annotations

import pytest
import torch

from fp4dist.comm import parts as p
from fp4dist.comm.codec import Noise
from fp4dist.spec.wire import Wire
from tests.kernels.triton import test_compiles as compiles

pytest.importorskip("triton")

NOISE = Noise(seed=1, step=2, bucket=3)
WIRES = (
    Wire(), Wire(rounding="stochastic", signs="per_rank", rotation=32), Wire(rounding="nearest", tag=False),
    Wire(kind="mxfp4"), Wire(kind="fp8"), Wire(kind="int4"),
)  # fmt: skip


@pytest.mark.parametrize("wire", WIRES, ids=Wire.label)
def test_the_first_stage_of_the_compiler_takes_it(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    from fp4dist.kernels.triton import wire as kernels

    launches = compiles.Launches()
    monkeypatch.setattr(kernels, "launch", launches)
    monkeypatch.setitem(compiles.TYPES, torch.int64, "i64")
    n = wire.chunk
    x = torch.zeros(n, dtype=torch.bfloat16 if wire.rotation else torch.float32)
    parts, runs = p.Parts.of([x], wire), ((0, 1),)
    base, offsets = p._placed(parts.tensors)
    record = torch.zeros(1, parts.unit, dtype=torch.uint8)
    for table, aligned in p._tables(parts.sizes, offsets, None, n, 0, runs, True, x.device):
        kernels.encode(base, table, record, p._shared(parts, NOISE, 1, None), 0, aligned)
    messages = record.repeat(2, 1)
    p._decode_on_gpu(p.Parts.of([x.clone()], wire), messages[:, None], NOISE, [0, 1], parts, 0.5, runs, True, None)
    p.recode_parts(parts, messages, NOISE, [0, 1], parts, 0.5, runs, NOISE.after, 1, False, None)
    assert launches.failed == []
    assert len(launches.seen) == 3


def test_sums_of_plain_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    from fp4dist.kernels.triton import wire as kernels

    launches = compiles.Launches()
    monkeypatch.setattr(kernels, "launch", launches)
    monkeypatch.setitem(compiles.TYPES, torch.int64, "i64")
    wire, x = Wire(kind="bf16"), torch.zeros(5000)
    own = p.Parts.of([x.bfloat16()], wire)
    messages = torch.zeros(2, 10000, dtype=torch.uint8)
    p._sum_plain_on_gpu(p.Parts.of([x], wire), messages, own, 0.5, ((0, 5000),), 1)
    p._sum_plain_on_gpu(p.Parts.of([x.bfloat16()], wire), messages, None, 0.5, ((0, 4999),), None)
    assert launches.failed == []
    assert len(launches.seen) == 3
