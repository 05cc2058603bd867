"""The wire codec: messages made and read on the device against those of the reference on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fp4dist.comm.codec import Noise, decode, encode
from fp4dist.kernels.wire import wire_kernels
from fp4dist.spec.wire import Wire
from fp4dist.verify.parity import Matrix

WIRES = (
    Wire(), Wire(rotation=32, signs="per_rank"), Wire(rounding="nearest", rotation=0), Wire(rounding="stochastic"),
    Wire(kind="mxfp4"), Wire(kind="fp8"), Wire(kind="int4"), Wire(chunk=16384),
)  # fmt: skip
_NOISE = Noise(seed=3_000_000_000, step=12, bucket=5)
_ELEMENTS = 5 * 4096 + 37
_RANK = 3


def differences(wire: Wire, x: Tensor, device: torch.device) -> Iterator[tuple[str, str]]:
    """(operation, what differs) of one vector on the CPU."""
    wanted = encode(x, wire, _NOISE, _RANK)
    found = encode(x.to(device), wire, _NOISE, _RANK).cpu()
    if not torch.equal(found, wanted):
        wrong = int((found != wanted).sum())
        yield "wire_encode", f"{wrong} of {wanted.numel()} bytes differ"
    values = decode(wanted, x.numel(), wire, _NOISE, _RANK)
    there = decode(wanted.to(device), x.numel(), wire, _NOISE, _RANK).cpu()
    if not torch.equal(values.nan_to_num(nan=-1.0), there.nan_to_num(nan=-1.0)):
        yield "wire_accumulate", f"{int((values != there).sum())} of {x.numel()} values differ"


def of_wires(matrix: Matrix, device: torch.device) -> None:
    """Every kind of record, of bf16 and fp32, into `matrix`."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(_ELEMENTS, generator=generator)
    x[:512] *= 1e-40
    x[600] = float("inf")
    backend = wire_kernels(device).backend
    for wire in WIRES:
        for dtype in (torch.float32, torch.bfloat16):
            found = dict(differences(wire, x.to(dtype), device))
            for op in ("wire_encode", "wire_accumulate"):
                matrix.note("communication", op, f"{wire.label()} of {wire.chunk}", backend, found.get(op))
