"""Where the Triton kernels and the reference differ: on a GPU, or on a CPU in Triton's interpreter.

    TRITON_INTERPRET=1 python -m tests.kernels.triton.parity      # exit status 1 if anything differs

The interpreter is chosen when the kernels are first imported, so tests without a GPU run this file as a program.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields, replace

import torch
from torch import Tensor

from fp4dist import numerics
from fp4dist.kernels.triton.matmul import carrier, dequantize, has_carrier, matmul
from fp4dist.kernels.triton.quantize import quantize, requantize, why_not
from fp4dist.numerics import BlockScaledTensor, Key
from fp4dist.numerics.quantize import carrier as reference_carrier
from fp4dist.spec.build import build
from fp4dist.spec.load import load_recipe, shipped
from fp4dist.spec.recipe import SLOTS, QuantSpec
from tests.generators import SPECS, exactly_summable, families

# seed and layer have their highest bits set; two runs of rows and columns as pieces of a sequence, or of SwiGLU, have
WHOLE = Key(seed=3_000_000_000, layer=4_000_000_000, step=12, micro_batch=5, slot=2)
FORWARD = ({"format": "nvfp4"}, {"format": "nvfp4", "block": [16, 16]}, {"format": "mxfp4"})


def specs() -> dict[str, QuantSpec]:
    """Every spec that these kernels take, of the shipped recipes and of tests/generators.py."""
    found = {build(QuantSpec, data) for data in SPECS.values()}
    for name in shipped("recipes"):
        for linear in load_recipe(name).linears.values():
            found |= {replace(spec, source="master") for slot in SLOTS if (spec := linear.slot(slot)) is not None}
    return {spec.label(): spec for spec in found if why_not(spec) is None}


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
                f"{label} {name}", numerics.quantize(x, spec, WHOLE), quantize(x.to(device), spec, WHOLE)
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
            found = requantize(_moved(q, device), spec, WHOLE)
            yield from _differences(f"requantize {label} from {data}", numerics.requantize(q, spec, WHOLE), found)


def of_products(device: torch.device) -> Iterator[str]:
    """Carriers of every spec bit for bit; a product whose sums are exact in any order."""
    for label, spec in specs().items():
        x = families(32, 128)["outliers"]
        q = numerics.quantize(x, spec, WHOLE)
        expected = reference_carrier(q)
        if has_carrier(q) and not _same(carrier(_moved(q, device)).float().cpu(), expected):
            yield f"carrier of {label}"
        if not _same(dequantize(_moved(q, device)).cpu(), numerics.dequantize(q)):
            yield f"dequantize of {label}"
    a, b = exactly_summable(32, 256), exactly_summable(48, 256, seed=1)
    if not _same(matmul(_moved(a, device), _moved(b, device)).cpu(), numerics.matmul(a, b)):
        yield "matmul"


def _moved(q: BlockScaledTensor, device: torch.device) -> BlockScaledTensor:
    return replace(q, codes=q.codes.to(device), scales=q.scales.to(device), global_scale=q.global_scale.to(device))


def _differences(what: str, expected: BlockScaledTensor, found: BlockScaledTensor) -> Iterator[str]:
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


def main() -> int:
    """Print every difference."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = [d for check in (of_quantizers, of_requantizers, of_products) for d in check(device)]
    print("\n".join(found) if found else f"no difference in {len(specs())} specs on {device}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
