"""Power-of-two quantizers: what is remembered of a slot changes no value, and mask bits are those of the reference.

TRITON_INTERPRET=1 python -m tests.kernels.triton.powers_parity      # exit status 1 if anything differs
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from fp4dist import numerics
from fp4dist.kernels.triton.carriers import to_carrier
from fp4dist.kernels.triton.matmul import matmul
from fp4dist.kernels.triton.power_programs import MEMORY
from fp4dist.kernels.triton.powers import quantize, quantize_pair, requantize, why_not
from fp4dist.kernels.triton.quantize import Side
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
    most = torch.finfo(torch.float32).max / x.abs().max().item() / 2
    steps |= {"huge": most, "huge again": most}
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


def of_spreads(device: torch.device) -> Iterator[str]:
    """Which binades a matrix spans: of each way to read it, the largest of several matrices, NaN and zeros left out."""
    x = families(64, 128)["normal"] * torch.logspace(-30, 15, 4, base=2.0).repeat_interleave(32)
    x[:, 32:64] = 0.0
    x[3, 5], x[32:64, 96] = float("nan"), 0.0
    for name, kinds in (("ceil, noise", (FP8[0], torch.bfloat16)), ("squares", (FP8[1],))):
        spec, expected = specs()[name], torch.zeros(2, dtype=torch.int32)
        spread = torch.zeros(2, dtype=torch.int32, device=device)
        for kind in kinds:
            factor = 2.0 ** (kind.itemsize * 4)  # the last matrix has the largest scale, and not the smallest
            quantize((x * factor).to(device), spec, WHOLE, want=Want(False, kind, spread=spread))
            expected = torch.maximum(expected, _spread(numerics.quantize(x * factor, spec, WHOLE)))
            if not torch.equal(spread.cpu(), expected):
                yield f"{name} {kind}: spans {spread.tolist()}, not {expected.tolist()}"
    x = families(128, 256)["normal"] * torch.logspace(-20, 15, 8, base=2.0).repeat_interleave(32)
    forward = build(QuantSpec, {"format": "mxfp4"})
    codes, made = numerics.quantize(x, forward, WHOLE), quantize(x.to(device), forward, WHOLE)
    spread = torch.zeros(2, dtype=torch.int32, device=device)
    assert isinstance(made, BlockScaledTensor)
    requantize(made, specs()["ceil, noise"], WHOLE, want=Want(False, torch.bfloat16, spread=spread))
    expected = _spread(numerics.requantize(codes, specs()["ceil, noise"], WHOLE))
    if not torch.equal(spread.cpu(), expected):
        yield f"codes of which a thread holds eight rows: span {spread.tolist()}, not {expected.tolist()}"


def _spread(q: BlockScaledTensor) -> Tensor:
    """[2] what `Want.spread` becomes of these codes."""
    scales = q.scales.int().repeat_interleave(q.block[0], 0).repeat_interleave(q.block[1], 1)
    low, high = (q.codes & 7) != 0, ((q.codes >> 4) & 7) != 0
    some = torch.stack((low, high), dim=-1).flatten(-2)
    scales, some = scales[scales < 255], some[scales < 255]
    return torch.stack((scales.max(), 256 - scales[some].min())).int()


def of_forms(device: torch.device) -> Iterator[str]:
    """Products in every form of the ladder that holds their operands, where sums are exact: those of the codes."""
    spec = specs()["floor, clipped"]
    octaves = {FP8[0]: 28, FP8[1]: 14, torch.bfloat16: 40}
    for form in ((FP8[0], FP8[1]), (FP8[1], FP8[0]), (FP8[0], FP8[0]), (torch.bfloat16, torch.bfloat16)):
        codes, given = [], []
        for kind, seed in zip(form, (0, 1), strict=True):
            far = torch.linspace(0, octaves[kind], 64).floor()  # rows of one scale each: no sum mixes them
            x = exactly_summable_values(64, 128, seed) * torch.exp2(far)[:, None]
            lost = torch.zeros((), dtype=torch.int32, device=device)
            codes.append(numerics.quantize(x, spec, WHOLE))
            given.append(quantize(x.to(device), spec, WHOLE, want=Want(False, kind, lost=lost)))
            if lost.item():
                yield f"{form}: {lost.item()} elements lost over {octaves[kind]} binades"
        exact = numerics.matmul(*codes)
        for into in (None, torch.ones(64, 64)):
            sums = None if into is None else into.clone().to(device)
            found = matmul(given[0], given[1], into=sums).cpu()
            if not torch.equal(found, exact if into is None else into + exact):
                yield f"{form}: the product, {'alone' if into is None else 'added'}"


def exactly_summable_values(rows: int, columns: int, seed: int) -> Tensor:
    """[rows, columns] levels of E2M1 of which each block of 32 has a 4 or a 6, so that its scale is 1."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.tensor([-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    x = levels[torch.randint(0, len(levels), (rows, columns), generator=generator)]
    x[:, ::32] = 6.0
    return x


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
    """Requantized codes and transposed matrices, with a memory: of outliers, and of rows that cancel when turned."""
    outliers = families(128, 64)["outliers"]
    alike = torch.zeros(128, 64)
    alike[:, ::32], alike[:, 1] = 1.0, -1.0
    for name, spec in specs().items():
        if spec.shape[0] > 1:
            continue
        memory = torch.zeros(MEMORY, dtype=torch.int32, device=device)
        forward = specs()["quest" if name == "floor" else "floor, clipped"]
        for i, x in enumerate((outliers, alike)):
            q = numerics.quantize(x, forward, WHOLE)
            here = replace(q, **{part: getattr(q, part).to(device) for part in ("codes", "scales", "global_scale")})
            master = original(q, forward.rotation, WHOLE).t()
            want = Want(True, FP8[1 - i], memory=memory)
            key = replace(WHOLE, step=3 * i)  # of signs under which a sum of zeros is a negative one
            back = None if forward.rotation is None else (forward.rotation, WHOLE)
            found = requantize(here, spec, key, want=want, back=back)
            yield from _wrong(f"{name} requantized {i}", numerics.quantize(master, spec, key), found)
            turned = x.t().contiguous().to(device).t()
            found = quantize(turned, spec, key, want=want)
            yield from _wrong(f"{name} transposed {i}", numerics.quantize(x, spec, key), found)


def of_pairs(device: torch.device) -> Iterator[str]:
    """A matrix and its transpose by one kernel: all that two calls give, count and remember, in the second pass too."""
    spec, small = specs()["floor"], families(96, 160)["outliers"]
    wide = families(64, 128)["normal"] * torch.logspace(-30, 15, 4, base=2.0).repeat_interleave(32)
    kept = [[torch.zeros(n, dtype=torch.int32, device=device) for n in (MEMORY, 1, 2)] for _ in range(4)]
    wants = [Want(False, kind, False, m, lost[0], s) for kind, (m, lost, s) in zip(FP8 * 2, kept, strict=True)]
    for i, matrix in enumerate((small, wide)):
        x = matrix.to(device)
        pair = quantize_pair(x, Side(spec, WHOLE, None, wants[0]), Side(spec, WHOLE, None, wants[1]))
        alone = quantize(x, spec, WHOLE, want=wants[2]), quantize(x.t(), spec, WHOLE, want=wants[3])
        for name, one, other in zip(("rows", "columns"), pair, alone, strict=True):
            assert isinstance(one, Carrier)
            assert isinstance(other, Carrier)
            same = torch.equal(one.values.view(torch.uint8), other.values.view(torch.uint8))
            if not same or one.scale.item() != other.scale.item():
                yield f"{name} of pair {i}"
    for one, other in zip(kept[:2], kept[2:], strict=True):
        if not all(map(torch.equal, one, other)):
            yield f"what is counted of a pair: {one}, not {other}"
        if not (one[0][0] and one[1] and one[2].all()):
            yield f"something is not counted: {one}"


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
            if name == "ceil, noise":
                expected = numerics.requantize(q, specs()[name], place)
                found = requantize(made, specs()[name], place, want=Want(False, FP8[1], memory=memory))
                yield from _unlike(f"{name} of {data}, values alone", expected, found)


def of_values(device: torch.device) -> Iterator[str]:
    """Values without codes, twice with one memory: of usual matrices at once, of all others when written again."""
    forward = specs()["quest"]
    rules = {"up": build(QuantSpec, {"format": "mxfp4", "scale": {"kind": "ceil", "of": "amax"}, "rotation": FRESH})}
    rules |= {name: specs()[name] for name in ("floor", "ceil, noise")}
    wanted = [Want(False, kind, memory=torch.zeros(MEMORY, dtype=torch.int32, device=device)) for kind in FP8]
    for i, ((name, x), rule) in enumerate(product(_matrices().items(), rules)):
        spec = rules[rule]
        for want in wanted if device.type == "cuda" else wanted[i % 2 :][:1]:
            expected = numerics.quantize(x, spec, WHOLE)
            for number in range(2):
                found = quantize(x.to(device), spec, WHOLE, want=want)
                yield from _unlike(f"{rule} {name} {number}", expected, found)
            if device.type != "cuda" and (name, rule) not in _OTHERWISE:
                continue
            turned = quantize(x.t().contiguous().to(device).t(), spec, WHOLE, want=want)
            yield from _unlike(f"{rule} {name} turned", expected, turned)
            q = numerics.quantize(x, forward, WHOLE)
            here = replace(q, **{part: getattr(q, part).to(device) for part in ("codes", "scales", "global_scale")})
            found = requantize(here, spec, WHOLE, want=want, back=(forward.rotation, WHOLE))
            master = original(q, forward.rotation, WHOLE).t()
            yield from _unlike(f"{rule} {name} codes", numerics.quantize(master, spec, WHOLE), found)


_OTHERWISE = {("steps", "ceil, noise"), ("outliers", "floor")}  # what the interpreter does not read as rows alone


def _matrices() -> dict[str, Tensor]:
    """[32, 64] with zeros of either sign, values at the middle of two levels, outliers, tiny values, NaN and Inf."""
    found = families(32, 64)
    signs = torch.where(torch.arange(64) % 3 == 0, -1.0, 1.0)
    matrices = {"outliers": found["outliers"], "zeros": torch.zeros(32, 64) * signs, "tiny": found["tiny"]}
    matrices["steps"] = (torch.arange(32)[:, None] / 4 * signs).to(torch.bfloat16).float()
    matrices["not finite"] = found["normal"]
    matrices["not finite"][3, 5], matrices["not finite"][9, 40] = float("nan"), float("inf")
    return matrices


def _unlike(what: str, expected: BlockScaledTensor, found: BlockScaledTensor | Carrier) -> Iterator[str]:
    """Whether values are not those of `expected`, as far as their type holds them."""
    assert isinstance(found, Carrier)
    parts = {part: getattr(expected, part).to(found.values.device) for part in ("codes", "scales", "global_scale")}
    alone = to_carrier(replace(expected, **parts), found.values.dtype)
    values, wanted = found.values.cpu(), alone.values.cpu()
    if alone.lost is None or alone.lost.item() == 0:  # any shift that holds all
        shift = torch.log2(found.scale.cpu().double() / alone.scale.cpu().double()).round()
        shift = shift.nan_to_num(0.0, 0.0, 0.0)  # of zeros
        values, wanted = values.double() * torch.exp2(shift), wanted.double()
        wanted = wanted.where(~wanted.isnan(), 8e9)
        values = values.where(~values.isnan(), 8e9)
    same = torch.equal(values.view(torch.uint8), wanted.view(torch.uint8))
    if not same:
        yield f"{what} in {found.values.dtype}"


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


CHECKS = (of_remembered, of_losses, of_spreads, of_forms, of_masks, of_turned, of_pairs, of_held, of_values)


def main() -> int:
    """Print every difference."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = [d for check in CHECKS for d in check(device)]
    print("\n".join(found) if found else f"no difference in {len(specs())} specs on {device}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
