"""Where the Triton kernels and the reference differ: on a GPU, or on a CPU in Triton's interpreter.

    TRITON_INTERPRET=1 python -m tests.kernels.triton.parity      # exit status 1 if anything differs
    python -m tests.kernels.triton.parity 3 8                     # every eighth check from the fourth on: compiling is
                                                                  # slow, and processes can share it
The interpreter is chosen when the kernels are first imported, so tests without a GPU run this file as a program.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields, replace

import torch
from torch import Tensor

from fp4dist import numerics
from fp4dist.kernels.triton import signs
from fp4dist.kernels.triton.carriers import to_carrier
from fp4dist.kernels.triton.matmul import dequantize, matmul
from fp4dist.kernels.triton.quantize import Side, amax
from fp4dist.kernels.triton.quantizers import is_fast, quantize, quantize_pair, requantize, why_not_pair
from fp4dist.numerics import BlockScaledTensor, Key
from fp4dist.numerics.handed import hand_over
from fp4dist.numerics.moment import Moment
from fp4dist.numerics.quantize import carrier as reference_carrier
from fp4dist.numerics.quantize import original
from fp4dist.numerics.rng import random_signs
from fp4dist.numerics.tensor import Carrier, Want
from fp4dist.spec.blocks import Hadamard
from fp4dist.spec.build import build
from fp4dist.spec.formats import FORMATS
from fp4dist.spec.load import load_recipe, shipped
from fp4dist.spec.recipe import SLOTS, QuantSpec
from tests.generators import SPECS, exactly_summable, families

_part = [slice(None)]  # of the specs, for this process
# seed and layer have their highest bits set; two runs of rows and columns as pieces of a sequence, or of SwiGLU, have
WHOLE = Key(seed=3_000_000_000, layer=4_000_000_000, step=12, micro_batch=5, slot=2)
BACK = {
    "32, no signs": {"format": "mxfp4", "scale": "quest", "rotation": {"size": 32, "signs": "none"}},
    "32, signs": {"format": "mxfp4", "rotation": {"size": 32, "signs": "fresh"}},
    "16": {"format": "nvfp4", "rotation": {"size": 16, "signs": "fixed"}},
    "128": {"format": "nvfp4", "rotation": {"size": 128, "signs": "none"}},
}
TURNED_BACK = ("mxfp4 1x32 4/3 rht*32", "mxfp4 1x32 ceil sr", "nvfp4 1x16 eden rht*128", "nvfp4 1x16 17/16 sr rht16")
FP8 = (torch.float8_e5m2, torch.float8_e4m3fn)
FORWARD = ({"format": "nvfp4"}, {"format": "nvfp4", "block": [16, 16]}, {"format": "mxfp4"})


def of_a_graph(device: torch.device) -> Key:
    """WHOLE with its time in device memory, as a CUDA graph has it; its numbers are those of another time."""
    moment = Moment(device, 1, 2)
    moment.set(WHOLE.step, WHOLE.micro_batch)
    return replace(WHOLE, step=3, micro_batch=4, moment=moment)


def specs() -> dict[str, QuantSpec]:
    """Every spec that these kernels take, of the shipped recipes and of tests/generators.py."""
    found = {build(QuantSpec, data) for data in SPECS.values()}
    for name in shipped("recipes"):
        for linear in load_recipe(name).linears.values():
            found |= {replace(spec, source="master") for slot in SLOTS if (spec := linear.slot(slot)) is not None}
    taken = {spec.label(): spec for spec in found if is_fast(spec)}
    return {label: taken[label] for label in sorted(taken)[_part[0]]}


def inputs(spec: QuantSpec) -> Iterator[tuple[str, Tensor]]:
    """Matrices whose sizes are ragged in tiles, of every family; NaN and Inf in one block."""
    rows, columns = 32, 256 if spec.rotation is not None and spec.rotation.size > 32 else 96
    found = families(rows, columns)
    for name in ("outliers", "ties", "zero_blocks", "tiny", "huge", "bf16"):
        yield name, found[name]
    for name, value in (("nan", float("nan")), ("inf", float("inf"))):
        x = found["normal"].clone()
        x[3, 5] = value
        yield name, x


def of_quantizers(device: torch.device) -> Iterator[str]:
    """Rows, transposed views, shards in two runs."""
    for label, spec in specs().items():
        for name, x in inputs(spec):
            shard = replace(
                WHOLE,
                row_runs=(0, x.shape[0] * 3),
                rows=x.shape[0] * 8,
                column_runs=(x.shape[1],),
                columns=x.shape[1] * 4,
            )
            yield from _differences(
                f"{label} {name}", numerics.quantize(x, spec, WHOLE), quantize(x.to(device), spec, of_a_graph(device))
            )
            if name in ("outliers", "bf16"):
                turned = x.t().contiguous().to(device).t()
                yield from _differences(
                    f"{label} {name} turned", numerics.quantize(x, spec, shard), quantize(turned, spec, shard)
                )


def of_requantizers(device: torch.device) -> Iterator[str]:
    """From the codes of each forward format."""
    x = families(128, 32)["outliers"]
    for label, spec in specs().items():
        for data in FORWARD:
            q = numerics.quantize(x, build(QuantSpec, data))
            found = requantize(_moved(q, device), spec, of_a_graph(device))
            yield from _differences(f"requantize {label} from {data}", numerics.requantize(q, spec, WHOLE), found)


def of_rotated_codes(device: torch.device) -> Iterator[str]:
    """Requantized from codes in a rotated basis, which their values are turned back from first."""
    x = families(128, 128)["outliers"]
    for label, data in BACK.items():
        forward = build(QuantSpec, data)
        assert forward.rotation is not None
        q = numerics.quantize(x, forward, WHOLE)
        master = original(q, forward.rotation, WHOLE).t()
        for name, spec in specs().items():
            if name not in TURNED_BACK:
                continue
            found = requantize(_moved(q, device), spec, WHOLE, back=(forward.rotation, WHOLE))
            yield from _differences(f"{name} from {label}", numerics.quantize(master, spec, WHOLE), found)


def of_products(device: torch.device) -> Iterator[str]:
    """Decoded values of every spec bit for bit; a product whose sums are exact in any order."""
    for label, spec in specs().items():
        q = numerics.quantize(families(32, 128)["outliers"], spec, WHOLE)
        if not _same(dequantize(_moved(q, device)).cpu(), numerics.dequantize(q)):
            yield f"dequantize of {label}"
    a, b = exactly_summable(32, 256), exactly_summable(48, 256, seed=1)
    if not _same(matmul(_moved(a, device), _moved(b, device)).cpu(), numerics.matmul(a, b)):
        yield "matmul"


def of_carriers(device: torch.device) -> Iterator[str]:
    """Carriers written by quantizers, alone and beside codes, and made of codes, straight and transposed."""
    x = families(32, 128)["outliers"]
    for label, spec in specs().items():
        q = numerics.quantize(x, spec, WHOLE)
        moved = _moved(q, device)
        types = [torch.bfloat16, *(FP8 if spec.format.scale.name == "e8m0" else ())]
        for dtype in types:
            yield from _wrong_carrier(f"to_carrier {label} {dtype}", q, to_carrier(moved, dtype))
            if spec.shape[0] == spec.shape[1]:
                turned = to_carrier(moved, dtype, transposed=True)
                yield from _wrong_carrier(f"to_carrier {label} {dtype} transposed", q.transpose(), turned)
        for dtype in types[:2]:
            both = quantize(x.to(device), spec, WHOLE, want=Want(True, dtype))
            alone = quantize(x.to(device), spec, WHOLE, want=Want(False, dtype))
            assert isinstance(both, BlockScaledTensor)
            assert isinstance(alone, Carrier)
            assert both.carrier is not None
            yield from _differences(f"{label} beside a carrier", q, replace(both, carrier=None))
            yield from _wrong_carrier(f"{label} {dtype} beside codes", q, both.carrier)
            yield from _wrong_carrier(f"{label} {dtype} alone", q, alone)
    for dtype in FP8:
        yield from _wrong_count(dtype, device)


def of_pairs(device: torch.device) -> Iterator[str]:
    """Both operands of one matrix, as the recipes quantize dY and x; the amax of odd shapes."""
    for row, column in pairs():
        size = max(spec.columns_multiple for spec in (row, column))
        x = families(128 + size, 128)["outliers"].to(torch.bfloat16)
        other = replace(WHOLE, slot=5)
        expected = numerics.quantize(x, row, WHOLE), numerics.quantize(x.t(), column, other)
        label = f"pair {row.label()} | {column.label()}"
        for want in (Want(), Want(False, torch.bfloat16)):
            sides = Side(row, WHOLE, None, want), Side(column, other, None, want)
            for of, a, b in zip(("x", "x^T"), expected, quantize_pair(x.to(device), *sides), strict=True):
                if isinstance(b, Carrier):
                    yield from _wrong_carrier(f"{label} {of}", a, b)
                else:
                    yield from _differences(f"{label} {of}", a, b)
        if row.rotation is None and column.rotation is not None:  # of whole tiles, for `amaxes`
            both = quantize_pair(x[:128].to(device), Side(row, WHOLE), Side(column, other))
            yield from _differences(f"{label} of 128 rows: x", numerics.quantize(x[:128], row, WHOLE), both[0])
            yield from _differences(f"{label} of 128 rows: x^T", numerics.quantize(x[:128].t(), column, other), both[1])
    generator = torch.Generator().manual_seed(0)
    for shape, value in (((7, 130), 0.0), ((5000,), float("nan")), ((3, 4, 33), float("inf"))):
        x = torch.randn(shape, generator=generator)
        x.view(-1)[17] += value
        if not _same(amax(x.to(device)).cpu(), x.abs().amax().float()):
            yield f"amax of {shape}"


def of_handed(device: torch.device) -> Iterator[str]:
    """An amax that comes with the matrix gives the same bits, and is not looked for again; NaN and Inf, too."""
    spec = build(QuantSpec, FORWARD[0])
    for value in (0.0, float("nan"), float("-inf")):
        x = families(64, 128)["outliers"].to(torch.bfloat16)
        x[3, 5] += value
        x = x.to(device)
        found = quantize(hand_over(x, x.abs().amax().float()), spec)
        yield from _differences(f"amax handed over {value}", numerics.quantize(x.cpu(), spec), found)
    x = families(64, 128)["outliers"].to(torch.bfloat16).to(device)
    for side in (Side(spec), Side(replace(spec, rotation=Hadamard(size=16, signs="fixed")))):
        alone = quantize(x, spec)
        row, _ = quantize_pair(hand_over(x, x.abs().amax().float() * 2), Side(spec), side)
        assert isinstance(alone, BlockScaledTensor)
        assert isinstance(row, BlockScaledTensor)
        expected = alone.global_scale * 2
        if not _same(row.global_scale.cpu(), expected.cpu()):
            yield "an amax that came with x was looked for again"
        x = x.clone()


def pairs() -> list[tuple[QuantSpec, QuantSpec]]:
    """(row, column) specs of what the shipped recipes quantize from one tensor, and that these kernels take."""
    found: dict[tuple[str, str], tuple[QuantSpec, QuantSpec]] = {}
    for name in shipped("recipes"):
        for linear in load_recipe(name).linears.values():
            for slots in (("dgrad.dy", "wgrad.dy"), ("fprop.x", "wgrad.x")):
                row, column = (linear.slot(slot) for slot in slots)
                if row is None or column is None or column.source != "master" or why_not_pair(row, column):
                    continue
                found.setdefault((row.label(), column.label()), (row, column))
    return [found[labels] for labels in sorted(found)][_part[0]]


def _wrong_carrier(what: str, q: BlockScaledTensor, found: Carrier) -> Iterator[str]:
    """Where `found` is not codes of `q`, exactly."""
    values, scale = found.values.float().cpu(), found.scale.cpu()
    if found.lost is not None:
        if found.lost.item():
            yield f"{what}: {found.lost.item()} elements lost"
        scale = scale / q.global_scale  # a power of two; the common factor need not be one
        values = values * scale
    elif not _same(scale, q.global_scale):
        yield f"{what}: scale"
    if found.rotation != q.rotation or not _same(values, reference_carrier(q)):
        yield f"{what}: values"


def _wrong_count(dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """Scales of 100 binades, every code under each: what does not fit is cut towards 0, and counted."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(25, 8)[:, :1600].contiguous()
    scales = torch.arange(60, 160, dtype=torch.uint8).repeat(25, 1)
    scales[3, 7] = 255  # NaN is neither the largest nor lost
    q = BlockScaledTensor(codes, scales, torch.tensor(0.75), FORMATS["mxfp4"], (1, 32))
    found = to_carrier(_moved(q, device), dtype)
    highest = 13 if dtype == torch.float8_e5m2 else 6
    wanted = reference_carrier(q).double() * 2.0 ** (highest - (159 - 127))
    held = wanted.to(dtype).double()  # every value has two bits of mantissa at most: only small ones can be rounded
    lost = (held != wanted) & ~wanted.isnan()
    if found.lost is None or found.lost.item() != lost.sum().item() or not 0 < lost.sum() < lost.numel():
        yield f"{dtype}: {found.lost} elements lost, not {lost.sum()}"
    values = found.values.cpu().double()
    same = (values == wanted) | (values.isnan() & wanted.isnan())
    if not torch.equal(same, ~lost) or not (values.abs() < wanted.abs())[lost].all():
        yield f"{dtype}: values of a wide tensor"
    if found.scale.item() != 0.75 * 2.0 ** (32 - highest):
        yield f"{dtype}: scale of a wide tensor"


def of_signs(device: torch.device) -> Iterator[str]:
    """Fresh signs of linears that are not all drawn together, as kernels find them; again after the time has moved."""
    rotation, moment = Hadamard(size=128, signs="fresh"), Moment(device)
    while len(signs._met) % signs._LINEARS != signs._LINEARS - 2:  # others came before
        signs._met[0, -len(signs._met)] = len(signs._met)
    for step, micro_batch in ((3, 2**31 + 4), (5, 6)):
        moment.set(step, micro_batch)
        for number in range(4):
            plain = Key(seed=7, layer=number * 1_356_675_123, step=step, micro_batch=micro_batch, slot=number % 6)
            expected = random_signs(128, plain.signs(), torch.device("cpu")) < 0
            for key in (plain, replace(plain, step=1, micro_batch=2, moment=moment)):
                words = signs.sign_words(rotation, key, device).cpu()
                if not torch.equal((words[:, None] >> torch.arange(32) & 1).flatten().bool(), expected):
                    yield f"signs of linear {number} at step {step}, {'graph' if key.moment else 'eager'}"


def _moved(q: BlockScaledTensor, device: torch.device) -> BlockScaledTensor:
    return replace(q, codes=q.codes.to(device), scales=q.scales.to(device), global_scale=q.global_scale.to(device))


def _differences(what: str, expected: BlockScaledTensor, found: BlockScaledTensor | Carrier) -> Iterator[str]:
    assert isinstance(found, BlockScaledTensor)
    for field in fields(BlockScaledTensor):
        a, b = getattr(expected, field.name), getattr(found, field.name)
        same = _same(a, b.cpu()) if isinstance(a, Tensor) else a == b
        if not same:
            yield f"{what}: {field.name}"


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, any NaN for a NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype == torch.float32:
        one, other = (torch.where(t.isnan(), 0x7FC00000, t.contiguous().view(torch.int32)) for t in (a, b))
        return torch.equal(one, other)
    return torch.equal(a, b)


CHECKS = (of_quantizers, of_requantizers, of_rotated_codes, of_products, of_carriers, of_pairs, of_handed, of_signs)


def main() -> int:
    """Print every difference."""
    if len(sys.argv) > 1:
        _part[0] = slice(int(sys.argv[1]), None, int(sys.argv[2]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = [d for check in CHECKS for d in check(device)]
    print("\n".join(found) if found else f"no difference in {len(specs())} specs on {device}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
