"""Power-of-two quantizers: what is remembered of a slot changes no value, and mask bits are those of the reference.

TRITON_INTERPRET=1 python -m tests.kernels.triton.powers_parity      # exit status 1 if anything differs
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fp4dist import numerics
from fp4dist.kernels.triton.carriers import to_carrier
from fp4dist.kernels.triton.power_programs import MEMORY
from fp4dist.kernels.triton.powers import quantize, requantize, why_not
from fp4dist.numerics import estimators
from fp4dist.numerics.quantize import carrier as reference_carrier
from fp4dist.numerics.quantize import original
from fp4dist.numerics.tensor import BlockScaledTensor, Carrier, Want
from fp4dist.spec.build import build
from fp4dist.spec.recipe import QuantSpec
from tests.generators import families
from tests.kernels.triton.parity import FP8, WHOLE

FRESH = {"size": 32, "signs": "fresh"}
SPECS = {
    "quest": {"format": "mxfp4", "scale": "quest", "rotation": {"size": 32, "signs": "none"}},
    "floor": {"format": "mxfp4", "scale": {"kind": "floor", "headroom": "4/3"}, "rotation": FRESH},
    "floor, clipped": {"format": "mxfp4", "scale": {"kind": "floor"}},
    "ceil, noise": {"format": "mxfp4", "scale": "ceil", "rounding": "stochastic"},
    "squares": {"format": "mxfp4", "block": [32, 32], "scale": {"kind": "ceil", "of": "amax", "finer_below": 0.87}},
}  # fmt: skip


def specs() -> dict[str, QuantSpec]:
    """Every scale rule, with and without rotation, noise and clipping."""
    found = {name: build(QuantSpec, data) for name, data in SPECS.items()}
    assert all(why_not(spec) is None for spec in found.values())
    return found


def of_remembered(device: torch.device) -> Iterator[str]:
    """One memory for matrices of very different sizes: carriers, codes and counts as of a matrix alone."""
    x = families(64, 128)["outliers"]
    steps = {"first": 1.0, "again": 1.0, "larger": 2.0, "far larger": 2.0**30, "far smaller": 2.0**-40, "zero": 0.0}
    for name, spec in specs().items():
        for dtype in FP8 if name in ("quest", "ceil, noise") else FP8[:1]:
            memory = torch.zeros(MEMORY, dtype=torch.int32, device=device)
            lost = torch.zeros((), dtype=torch.int32, device=device)
            kept = True
            for step, factor in [*steps.items(), ("last", 1.0)]:
                before = memory[0].item()
                found = quantize((x * factor).to(device), spec, WHOLE, want=Want(True, dtype, memory=memory, lost=lost))
                alone = numerics.quantize(x * factor, spec, WHOLE)
                yield from _wrong(f"{name} {dtype} {step}", alone, found)
                top = int(alone.scales.max())
                if memory.tolist() != [top, *[0] * (MEMORY - 1)] or lost.item():
                    yield f"{name} {dtype} {step}: memory {memory.tolist()}, lost {lost.item()}"
                assert isinstance(found, BlockScaledTensor)
                assert found.carrier is not None
                kept = kept and (step != "again" or before == top)
                shift = found.carrier.scale / alone.global_scale.to(device)
                remembered = 2.0 ** (before + 3 - 127 - (13 if dtype == FP8[0] else 6))
                if step in ("again", "larger") and shift.item() != remembered:
                    yield f"{name} {dtype} {step}: not under the remembered shift"
            if not kept:
                yield f"{name} {dtype}: the largest scale is not remembered"


def of_losses(device: torch.device) -> Iterator[str]:
    """Scales of more binades than a type has: the count of the codes' own carrier, whatever was remembered."""
    x = families(64, 128)["normal"] * torch.logspace(-30, 15, 4, base=2.0).repeat_interleave(32)
    spec = specs()["ceil, noise"]
    for dtype in FP8:
        memory = torch.zeros(MEMORY, dtype=torch.int32, device=device)
        lost = torch.zeros((), dtype=torch.int32, device=device)
        for factor in (1.0, 0.5, 2.0**20):
            codes = quantize((x * factor).to(device), spec, WHOLE)
            assert isinstance(codes, BlockScaledTensor)
            expected = to_carrier(codes, dtype)
            found = quantize((x * factor).to(device), spec, WHOLE, want=Want(False, dtype, memory=memory, lost=lost))
            assert isinstance(found, Carrier)
            assert expected.lost is not None
            count = expected.lost.item()
            if not count or lost.item() != count or memory[3].item() != count:
                yield f"{dtype}: {count} elements lost, counted {lost.item()} and {memory[3].item()}"
            if not torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8)):
                yield f"{dtype}: values where some are lost"
            if found.scale.item() != expected.scale.item():
                yield f"{dtype}: scale where some are lost"
            lost.zero_()


def of_masks(device: torch.device) -> Iterator[str]:
    """Bits that the quantizers write on the way."""
    found = families(32, 128)
    matrices = [found[name] for name in ("outliers", "zero_blocks", "tiny", "huge", "bf16")]
    for value in (float("nan"), float("inf")):
        matrices.append(found["normal"].clone())
        matrices[-1][3, 5] = value
    for name, spec in specs().items():
        if spec.shape[0] > 1:
            continue
        for i, x in enumerate(matrices):
            q = quantize(x.to(device), spec, WHOLE, want=Want(True, mask=True))
            assert isinstance(q, BlockScaledTensor)
            expected = numerics.quantize(x, spec, WHOLE)
            bits = estimators.mask(x, expected.scales, expected.global_scale, spec, WHOLE)
            if q.inside is None or not torch.equal(q.inside.cpu(), bits):
                yield f"{name}: mask of matrix {i}"


def of_turned(device: torch.device) -> Iterator[str]:
    """Requantized codes and transposed matrices, with a memory."""
    x = families(128, 64)["outliers"]
    for name, spec in specs().items():
        if spec.shape[0] > 1:
            continue
        memory = torch.zeros(MEMORY, dtype=torch.int32, device=device)
        forward = specs()["quest" if name == "floor" else "floor, clipped"]
        q = numerics.quantize(x, forward, WHOLE)
        here = replace(q, **{part: getattr(q, part).to(device) for part in ("codes", "scales", "global_scale")})
        master = original(q, forward.rotation, WHOLE).t()
        for i in range(2):
            want = Want(True, FP8[1], memory=memory)
            back = None if forward.rotation is None else (forward.rotation, WHOLE)
            found = requantize(here, spec, WHOLE, want=want, back=back)
            yield from _wrong(f"{name} requantized {i}", numerics.quantize(master, spec, WHOLE), found)
            turned = x.t().contiguous().to(device).t()
            found = quantize(turned, spec, WHOLE, want=want)
            yield from _wrong(f"{name} transposed {i}", numerics.quantize(x, spec, WHOLE), found)


def of_held(device: torch.device) -> Iterator[str]:
    """Requantized codes of which a program holds eight rows at a time; with and without a common factor, and noise."""
    x = families(128, 256)["outliers"]
    for name in ("ceil, noise", "floor, clipped"):
        for data in ({"format": "mxfp4"}, {"format": "mxfp4", "scale": {"kind": "floor", "headroom": "4/3"}}):
            q = numerics.quantize(x, build(QuantSpec, data), WHOLE)
            made = quantize(x.to(device), build(QuantSpec, data), WHOLE)
            assert isinstance(made, BlockScaledTensor)
            place = replace(WHOLE, row_runs=(64, 1024), rows=4096, column_runs=(96,), columns=512)
            wants = Want(True, FP8[1]), Want(True, torch.bfloat16), Want(True, FP8[1])
            memory = torch.zeros(MEMORY, dtype=torch.int32, device=device)
            for want in wants:
                found = requantize(made, specs()[name], place, want=want._replace(memory=memory))
                expected = numerics.requantize(q, specs()[name], place)
                yield from _wrong(f"{name} of {data} for {want.carrier}", expected, found)


def _wrong(what: str, expected: BlockScaledTensor, found: BlockScaledTensor | Carrier) -> Iterator[str]:
    """Where codes, scales or the carrier beside them are not those of `expected`."""
    assert isinstance(found, BlockScaledTensor)
    carrier = found.carrier
    assert carrier is not None
    if not torch.equal(found.codes.cpu(), expected.codes) or not torch.equal(found.scales.cpu(), expected.scales):
        yield f"{what}: codes"
    values = carrier.values.float().cpu() * (carrier.scale.cpu() / expected.global_scale)
    if not _same(values, reference_carrier(expected)):
        yield f"{what}: carrier"


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


CHECKS = (of_remembered, of_losses, of_masks, of_turned, of_held)


def main() -> int:
    """Print every difference."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = [d for check in CHECKS for d in check(device)]
    print("\n".join(found) if found else f"no difference in {len(specs())} specs on {device}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
