"""Where the general quantizers in Triton and the reference differ: on a GPU, or in Triton's interpreter on a CPU.

TRITON_INTERPRET=1 python -m tests.kernels.triton.grids_parity      # exit status 1 if anything differs
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields, replace

import torch
from torch import Tensor

from fp4dist import numerics
from fp4dist.kernels.triton import grid_values, grids, levels, moments
from fp4dist.kernels.triton import quantize as fast
from fp4dist.kernels.triton.matmul import matmul
from fp4dist.numerics import BlockScaledTensor, Key
from fp4dist.numerics.grouping import chunk_of, spread, tree_sum
from fp4dist.numerics.matmul import _factors
from fp4dist.numerics.splits import bare
from fp4dist.numerics.tensor import Carrier, Want
from fp4dist.spec.blocks import Ema
from fp4dist.spec.build import build
from fp4dist.spec.estimators import Straight
from fp4dist.spec.load import load_recipe, shipped
from fp4dist.spec.recipe import SLOTS, QuantSpec
from fp4dist.spec.statistics import Current
from tests.generators import SPECS, families

TURNED = {
    "rounding": "stochastic", "scale": {"kind": "absmax", "headroom": "17/16", "nonzero": True},
    "rotation": {"size": 16, "signs": "fresh"},
}  # fmt: skip
WHOLE = Key(seed=3_000_000_000, layer=4_000_000_000, step=12, micro_batch=5, slot=2)
# Every branch, beside the shipped recipes.
MORE: tuple[dict, ...] = (
    {"format": "nvfp4", "outer": "row"},
    {"format": "nvfp4", "outer": "none"},
    {"format": "nvfp4", "scale": "four_over_six", "rounding": {"kind": "nearest", "ties": "up"}},
    {"format": {"element": "e3m0", "scale": "fp32", "block": "row"}, "rounding": "stochastic"},
    {"format": {"element": "int2", "scale": "fp32", "block": [16, 16]}},
    {"format": "mxfp8", "scale": "ceil"},
    {"format": "mxfp4", "scale": {"kind": "ceil", "of": "amax", "finer_below": 0.87}, "rounding": {"kind": "ema"}},
    {"format": "fp4_row", "scale": {"kind": "quest", "spread": "rms"}},
)


def specs() -> dict[str, QuantSpec]:
    """Every spec of the shipped recipes and of tests/generators.py that the fast kernels lack, and MORE."""
    found = {build(QuantSpec, data) for data in SPECS.values()}
    for name in shipped("recipes"):
        for linear in load_recipe(name).linears.values():
            found |= {_codes_alone(spec) for slot in SLOTS if (spec := linear.slot(slot)) is not None}
    found = {spec for spec in found if fast.why_not(spec) is not None} | {build(QuantSpec, data) for data in MORE}
    return {spec.label(): spec for spec in found if grids.why_not(spec) is None}


def _codes_alone(spec: QuantSpec) -> QuantSpec:
    """What decides its codes."""
    return replace(bare(spec), source="master", estimator=Straight(), amax=Current())


def matrices(spec: QuantSpec) -> Iterator[tuple[str, Tensor]]:
    """Of sizes that are ragged in tiles, of every family; NaN and Inf in one block."""
    rows, columns = max(16, spec.rows_multiple), 256 if spec.columns_multiple > 32 else 160
    found = families(rows, columns)
    found["tiny"][:, : columns // 2] = 0
    for name in ("outliers", "ties", "tiny", "huge", "bf16"):
        yield name, found[name]
    x = found["normal"].clone()
    x[3, 5], x[9, 40] = float("nan"), float("inf")
    yield "not finite", x


def of_quantizers(device: torch.device) -> Iterator[str]:
    """Rows; transposed views of shards in two runs."""
    for label, spec in specs().items():
        for name, x in matrices(spec):
            average = x.float() * 1.3 - 0.2 if isinstance(spec.rounding, Ema) else None
            toward = average.to(device) if average is not None else None
            expected = numerics.quantize(x, spec, WHOLE, None, average)
            found = grids.quantize(x.to(device), spec, WHOLE, None, toward)
            yield from differences(f"{label} {name}", expected, found)
            if name == "bf16":
                yield from of_wants(f"{label} {name}", x.to(device), spec, found)
            if name == "bf16":
                turned = x.t().contiguous().to(device).t()
                key = replace(
                    WHOLE, row_runs=(0, x.shape[0] * 3), rows=x.shape[0] * 8, column_runs=(x.shape[1],),
                    columns=x.shape[1] * 4,
                )  # fmt: skip
                expected = numerics.quantize(x, spec, key)
                yield from differences(f"{label} {name} turned", expected, grids.quantize(turned, spec, key))
                yield from of_values(f"{label} {name}", expected, device)
                if expected.scales.numel() == 1 and expected.samples == expected.rotation == 1:
                    yield from of_values(f"{label} {name} transposed", expected.transpose(), device)


def of_wants(what: str, x: Tensor, spec: QuantSpec, q: BlockScaledTensor | Carrier) -> Iterator[str]:
    """A carrier beside the codes, and alone."""
    assert isinstance(q, BlockScaledTensor)
    if isinstance(spec.rounding, Ema) or grid_values.why_not_carrier(q, torch.bfloat16) is not None:
        return
    expected = grid_values.to_carrier(q, torch.bfloat16)
    for codes in (True, False):
        found = grids.quantize(x, spec, WHOLE, want=Want(codes, torch.bfloat16))
        carrier = found.carrier if isinstance(found, BlockScaledTensor) else found
        if isinstance(found, BlockScaledTensor) != codes or carrier is None:
            yield f"{what}: not what was wanted"
        elif not all(map(same, _parts(carrier), _parts(expected))):
            yield f"{what}: carrier beside codes" if codes else f"{what}: carrier alone"


def of_values(what: str, q: BlockScaledTensor, device: torch.device) -> Iterator[str]:
    """Decoded values, and carriers of every type that holds them."""
    on_device = moved(q, device)
    if not grid_values.has_values(q):
        yield from ([] if q.samples > 1 else [f"{what}: cannot be decoded"])
        return
    if not same(grid_values.dequantize(on_device).cpu(), numerics.dequantize(q)):
        yield f"{what}: dequantize"
    expected = _factors(q)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        if grid_values.why_not_carrier(q, dtype) is not None:
            continue
        carrier = grid_values.to_carrier(on_device, dtype)
        if carrier.values.dtype != dtype or not all(map(same, _parts(carrier), (expected.inner, *expected[1:]))):
            yield f"{what}: carrier in {dtype}"


def _parts(carrier: Carrier) -> tuple[Tensor, Tensor | None, Tensor]:
    """(inner, rows, scale) as `numerics.matmul` has them: factors of parts of rows multiply inside."""
    values, rows = carrier.values.cpu().float(), carrier.rows.cpu() if carrier.rows is not None else None
    if rows is not None and rows.shape[1] > 1:
        values, rows = values * spread(rows, values.shape), None
    return values, rows, carrier.scale.cpu()


def of_levels(device: torch.device) -> Iterator[str]:
    """FP8 carriers straight from the quantizers, of rows and of a transposed view; those of codes read transposed."""
    taken = 0
    for label, spec in specs().items():
        x = families(34, 176)["ties"].bfloat16()
        x[3, 5] = float("nan")
        for dtype, source in ((torch.float8_e4m3fn, x), (torch.float8_e5m2, x.t().contiguous().t())):
            want = Want(spec.samples == 1, dtype)
            if not levels.takes(spec, want, source.shape[1], None):
                continue
            taken += 1
            q = numerics.quantize(source, spec, WHOLE)
            found = grids.quantize(source.to(device), spec, WHOLE, want=want)
            carrier = found.carrier if isinstance(found, BlockScaledTensor) else found
            draws = [_factors(q.sample(i)) for i in range(q.samples)]
            inner = draws[0].inner if q.samples == 1 else draws[0].inner + draws[1].inner
            expected = inner, draws[0].rows, draws[0].scale / q.samples
            if carrier is None or not all(map(same, _parts(carrier), expected)):
                yield f"{label}: {dtype} beside codes" if want.codes else f"{label}: {dtype} alone"
            if isinstance(found, BlockScaledTensor):
                yield from differences(f"{label} with {dtype}", q, replace(found, carrier=None))
            turned = x[:32].t()  # codes of it have rows of 32
            q = numerics.quantize(turned, spec, WHOLE) if want.codes else q
            if levels.turns(q, dtype):
                straight, codes = _factors(q.transpose()), moved(q, device)
                assert isinstance(codes, BlockScaledTensor)
                parts = _parts(grid_values.to_carrier(codes, dtype, transposed=True))
                if not all(map(same, parts, (straight.inner, straight.rows, straight.scale))):
                    yield f"{label}: {dtype} of codes read transposed"
    if taken < 10:
        yield f"FP8 carriers of {taken} specs and types alone"


def of_tiles(device: torch.device) -> Iterator[str]:
    """From codes under outer tiles, read transposed in registers; their carriers, whose factors lie near each other."""
    plain, drawn = (build(QuantSpec, {"format": "nvfp4", "outer": [1, 128], **more}) for more in ({}, TURNED))
    x = families(256, 384)["outliers"]
    x[0], x[1], x[3, 5], x[9, 200] = 1e-38, 3e38, float("nan"), float("inf")
    q = numerics.quantize(x, plain, WHOLE)
    for spec in (plain, drawn):
        expected = numerics.requantize(q, spec, WHOLE)
        codes = moved(q, device)
        assert isinstance(codes, BlockScaledTensor)
        found = grids.requantize(codes, spec, WHOLE, want=Want(True, torch.bfloat16))
        assert isinstance(found, BlockScaledTensor)
        assert found.carrier is not None
        yield from differences(f"{spec.label()} from tiles", expected, replace(found, carrier=None))
        for carrier in (found.carrier, grid_values.to_carrier(replace(found, carrier=None), torch.bfloat16)):
            assert carrier.rows is not None
            factors = carrier.rows[~carrier.rows.isnan()]
            if not carrier.near or not ((factors >= 2.0**-8) & (factors < 2)).all():
                yield f"{spec.label()}: factors of tiles far from each other"
            if not all(map(same, _parts(carrier), _factors_of(expected))):
                yield f"{spec.label()}: carrier of tiles"


def _factors_of(q: BlockScaledTensor) -> tuple[Tensor, Tensor | None, Tensor]:
    found = _factors(q)
    return found.inner, found.rows, found.scale


def of_requantizers(device: torch.device) -> Iterator[str]:
    """From NVFP4 codes."""
    q = numerics.quantize(families(256, 32)["outliers"], build(QuantSpec, {"format": "nvfp4"}))
    codes = moved(q, device)
    for label, spec in specs().items():
        if not isinstance(spec.rounding, Ema):
            expected, found = numerics.requantize(q, spec, WHOLE), grids.requantize(codes, spec, WHOLE)
            yield from differences(f"requantize {label}", expected, found)


def of_moments(device: torch.device) -> Iterator[str]:
    """Sums over chunks of even and odd sizes, of what a kernel adds up and of what is left for torch."""
    for rows, columns in ((256, 1024), (96, 2048), (33, 4096)):
        x = families(rows, columns)["outliers"].to(torch.bfloat16)
        chunk = chunk_of(rows), chunk_of(columns)
        if not moments.has_sums(x, chunk):
            yield f"no sums over chunks {chunk}"
            continue
        y = x.float() * 0.5
        found = moments.sums(x.to(device), torch.full((1, 1), 2.0, device=device), chunk)
        for what, total, values in zip(("squares", "magnitudes"), found, (y * y, y.abs()), strict=True):
            if not same(total.cpu(), tree_sum(values, chunk)):
                yield f"sums of {what} over {chunk} of {rows} x {columns}"


def of_products(device: torch.device) -> Iterator[str]:
    """Products of codes, and of codes and plain matrices, to the rounding of fp32 sums."""
    w = families(32, 256, seed=3)["normal"]
    for label, spec in specs().items():
        x = families(max(16, spec.rows_multiple), 256)["normal"]
        a, b = numerics.quantize(x, spec, WHOLE), numerics.quantize(w, spec, replace(WHOLE, slot=3))
        for other in [b] if a.rotation > 1 else [b, w, w.bfloat16()]:
            values = numerics.dequantize(other) if isinstance(other, BlockScaledTensor) else other.float()
            bound = 256 * 2.0**-23 * (numerics.dequantize(a).abs() @ values.abs().t())
            found = matmul(moved(a, device), moved(other, device)).cpu()
            if not ((found - numerics.matmul(a, other)).abs() <= bound).all():
                yield f"{label}: product with {type(other).__name__}"


def moved(operand: BlockScaledTensor | Tensor, device: torch.device) -> BlockScaledTensor | Tensor:
    """The same on another device."""
    if isinstance(operand, Tensor):
        return operand.to(device)
    return replace(operand, **{n: getattr(operand, n).to(device) for n in ("codes", "scales", "global_scale")})


def of_shards(device: torch.device) -> Iterator[str]:
    """Halves of a matrix, with the amax of the whole: `reduce_max` is asked as the reference asks it."""
    x = families(32, 512)["outliers"]
    for label, spec in specs().items():
        half, key = x[:, :256], replace(WHOLE, rows=32, columns=512)

        def held(values: Tensor) -> Tensor:
            return values * 2.0

        expected, found = (
            numerics.quantize(half, spec, key, held), grids.quantize(half.to(device), spec, key, held)
        )  # fmt: skip
        yield from differences(f"shard {label}", expected, found)


def differences(what: str, expected: BlockScaledTensor, found: object) -> Iterator[str]:
    """The fields that differ."""
    for field in fields(BlockScaledTensor):
        a, b = getattr(expected, field.name), getattr(found, field.name)
        if not (same(a, b.cpu()) if isinstance(a, Tensor) else a == b):
            yield f"{what}: {field.name}"


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal bits, any NaN for a NaN; or nothing, both."""
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype == torch.float32:
        one, other = (torch.where(t.isnan(), 0x7FC00000, t.contiguous().view(torch.int32)) for t in (a, b))
        return torch.equal(one, other)
    return torch.equal(a, b)


CHECKS = (of_quantizers, of_levels, of_tiles, of_requantizers, of_shards, of_moments, of_products)


def main() -> int:
    """Print every difference."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = [difference for check in CHECKS for difference in check(device)]
    print("\n".join(found) if found else f"no difference in {len(specs())} specs on {device}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
