"""Where the kernels of csrc/ and the reference differ, over the matrix of tests/kernels/triton/parity.py.

python -m tests.kernels.cuda.parity          # on a GPU, with the extension built; exit status 1 if anything differs
python -m tests.kernels.cuda.parity 3 8      # every eighth spec from the fourth on, for several processes
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from fp4dist import numerics
from fp4dist.kernels.cuda import decode, jobs, ops, quantize
from fp4dist.numerics.layout import swizzle
from fp4dist.numerics.tensor import BlockScaledTensor, Carrier, Want
from fp4dist.spec.build import build
from fp4dist.spec.recipe import QuantSpec
from tests.generators import families
from tests.kernels.triton import parity as matrix
from tests.kernels.triton import powers_parity as powers

EDEN = {  # of other rotations than the recipes'
    f"eden {size} {signs}": {"format": "nvfp4", "rounding": "eden", "rotation": {"size": size, "signs": signs}}
    for size, signs in ((16, "fresh"), (32, "fresh"))
}
OURS = {
    "quantize": quantize.quantize, "requantize": quantize.requantize, "quantize_pair": quantize.quantize_pair,
    "Side": quantize.Side, "amax": ops.amax, "to_carrier": decode.to_carrier,
    "is_fast": lambda spec: jobs.why_not(spec) is None,
    "why_not_pair": jobs.why_not_pair, "dequantize": decode.dequantize, "matmul": numerics.matmul,
}  # fmt: skip
CHECKS = (
    "quantizers",
    "requantizers",
    "rotated_codes",
    "products",
    "carriers",
    "pairs",
    "handed",
    "layouts",
    "other_rotations",
    "odd_rows",
    "memories",
    "values_alone",
)


def use_ours() -> None:
    """The matrix, with these kernels in place of Triton's."""
    for name, function in OURS.items():
        assert hasattr(matrix, name), name
        setattr(matrix, name, function)
        if hasattr(powers, name):
            setattr(powers, name, function)


def of_memories(device: torch.device) -> Iterator[str]:
    """FP8 values that quantizers write at a remembered shift, alone and in pairs; mask bits beside codes."""
    for check in (powers.of_remembered, powers.of_losses, powers.of_turned, powers.of_held, powers.of_masks):
        yield from check(device)
    x = families(64, 128)["normal"] * torch.logspace(-30, 15, 4, base=2.0).repeat_interleave(32)
    x = x.to(device=device, dtype=torch.bfloat16)
    for row, column in ((spec, other) for spec, other in matrix.pairs() if spec.format.scale.name == "e8m0"):
        memories = torch.zeros((4, powers.MEMORY), dtype=torch.int32, device=device)
        wants = [Want(False, powers.FP8[i % 2], memory=memories[i]) for i in range(4)]
        for _ in range(2):
            pair = quantize.quantize_pair(
                x,
                *(
                    quantize.Side(spec, matrix.WHOLE, None, want)
                    for spec, want in zip((row, column), wants[:2], strict=True)
                ),
            )
            alone = (
                quantize.quantize(x, row, matrix.WHOLE, want=wants[2]),
                quantize.quantize(x.t(), column, matrix.WHOLE, want=wants[3]),
            )
            for one, other in zip(pair, alone, strict=True):
                assert isinstance(one, Carrier)
                assert isinstance(other, Carrier)
                same = torch.equal(one.values.view(torch.uint8), other.values.view(torch.uint8))
                if not same or not torch.equal(one.scale, other.scale):
                    yield f"FP8 of the pair {row.label()} | {column.label()}"
        if not torch.equal(memories[:2], memories[2:]) or not memories[:, 0].all():
            yield f"what is remembered of the pair {row.label()} | {column.label()}: {memories.tolist()}"


def of_values_alone(device: torch.device) -> Iterator[str]:
    """FP8 values rounded without codes, of matrices that fit: those that stand beside codes."""
    x = torch.randn((64, 128), generator=torch.Generator().manual_seed(1))
    x = x * torch.logspace(-3, 3, 4, base=2.0).repeat_interleave(16)[:, None]
    x[3, :64], x[5, 7], x[7, 9], x[9] = 0.0, -0.0, 1e-41, torch.arange(128) / 16
    for spec in matrix.specs().values():
        if spec.format.scale.name != "e8m0" or not jobs.form_of(spec).values_alone:
            continue
        for i, fp8 in enumerate(powers.FP8):
            moved = x.to(device=device, dtype=(torch.bfloat16, torch.float32)[i])
            moved = moved.t() if i else moved
            memories = torch.zeros((2, powers.MEMORY), dtype=torch.int32, device=device)
            before = 127 if spec.rotation is None else 131
            memories[:, 0] = before
            alone, beside = (
                quantize.quantize(moved, spec, matrix.WHOLE, want=Want(codes, fp8, memory=memory))
                for codes, memory in zip((False, True), memories, strict=True)
            )
            assert isinstance(alone, Carrier)
            assert isinstance(beside, BlockScaledTensor)
            other = beside.carrier
            assert other is not None
            shared, top = jobs.form_of(spec).shared, before + 3 - (13 if fp8 == torch.float8_e5m2 else 6)
            assert shared is not None
            if not torch.equal(alone.values.view(torch.uint8), other.values.view(torch.uint8)):
                yield f"FP8 values of {spec.label()} without codes"
            if not torch.equal(alone.scale, other.scale) or float(alone.scale) != shared * 2.0 ** (top - 127):
                yield f"scale of FP8 values of {spec.label()} without codes: {float(alone.scale)}"
            if not torch.equal(memories[0], memories[1]):
                yield f"what is remembered of {spec.label()} without codes: {memories.tolist()}"


def of_layouts(device: torch.device) -> Iterator[str]:
    """Scales in 128 x 4 tiles, of blocks of one row and of sixteen."""
    for block in ([1, 16], [16, 16]):
        q = numerics.quantize(families(160, 336)["outliers"], build(QuantSpec, {"format": "nvfp4", "block": block}))
        moved = replace(q, scales=q.scales.to(device))
        if not torch.equal(decode.swizzled(moved).cpu(), swizzle(q.scales, q.block[0])):
            yield f"swizzle of blocks {block}"


def of_other_rotations(device: torch.device) -> Iterator[str]:
    """MS-EDEN under rotations that no shipped recipe has."""
    for name, data in EDEN.items():
        spec = build(QuantSpec, data)
        for family in ("outliers", "tiny", "bf16"):
            x = families(48, 160)[family]
            expected = numerics.quantize(x, spec, matrix.WHOLE)
            for label, moved in (("", x.to(device)), (" turned", x.t().contiguous().to(device).t())):
                found = quantize.quantize(moved, spec, matrix.WHOLE)
                yield from matrix._differences(f"{name} {family}{label}", expected, found)


def of_odd_rows(device: torch.device) -> Iterator[str]:
    """Transposes whose columns in memory cannot be read two at a time."""
    for name, spec in matrix.specs().items():
        if spec.shape[0] > 1 or jobs.why_not(spec) is not None:
            continue
        x = families(5, 256)["outliers"].bfloat16()
        found = quantize.quantize(x.t().contiguous().to(device).t(), spec, matrix.WHOLE)
        yield from matrix._differences(f"{name} of five rows", numerics.quantize(x, spec, matrix.WHOLE), found)


def differences(check: str, device: torch.device) -> Iterator[str]:
    """What differs in one of CHECKS."""
    use_ours()
    mine = {
        "layouts": of_layouts, "other_rotations": of_other_rotations, "memories": of_memories,
        "values_alone": of_values_alone, "odd_rows": of_odd_rows,
    }  # fmt: skip
    yield from (mine[check] if check in mine else getattr(matrix, f"of_{check}"))(device)


def main(device: torch.device) -> int:
    """Print every difference."""
    use_ours()
    if len(sys.argv) > 1:
        matrix._part[0] = slice(int(sys.argv[1]), None, int(sys.argv[2]))
    found = [d for check in CHECKS for d in differences(check, device)]
    print("\n".join(found) if found else f"no difference in {len(matrix.specs())} specs on {device}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(torch.device("cuda")))
