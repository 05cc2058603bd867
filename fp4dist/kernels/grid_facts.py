"""What kernels for any grid agree on, whichever backend they belong to: room for scales, values a carrier holds."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from fp4dist.numerics import scales
from fp4dist.numerics.grouping import Grouping
from fp4dist.numerics.tensor import BlockScaledTensor
from fp4dist.spec.blocks import Ceil, Floor
from fp4dist.spec.formats import ElementFormat
from fp4dist.spec.recipe import QuantSpec

# dtypes of decoded values, as `grid_programs` and enum ValueType of csrc/grid.h number them
OUT = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2, torch.float8_e5m2: 3}
SHORTEST_PART = 32  # columns of a part from which on its scale can multiply a partial sum


def why_not_carrier(q: BlockScaledTensor, dtype: torch.dtype, decodes: bool) -> str | None:
    """Why the values of `q` cannot be written in `dtype`, exactly, or None.

    decodes   whether the backend can decode `q` at all
    """
    outside = of_parts_of_rows(q)
    lacks = (
        (dtype not in OUT or dtype == torch.float32, f"{dtype}"),
        (not decodes, f"{q.samples} samples of {q.format.element.name}"),
        (not outside and not q.format.scale.bf16_exact, f"{q.format.scale.name} scales of blocks {list(q.block)}"),
        (not outside and dtype != torch.bfloat16, f"{q.format.scale.name} scales in {dtype}"),
        (outside and not _fits(q.format.element, dtype), f"elements {q.format.element.name} in {dtype}"),
    )
    return next((f"no carrier of {what}" for missing, what in lacks if missing), None)


def of_parts_of_rows(q: BlockScaledTensor) -> bool:
    """Whether fp32 block scales can stay outside of a GEMM's partial sums: those of rows, or of long parts of them."""
    return q.format.scale.name == "fp32" and q.block[1] >= SHORTEST_PART and q.global_scale.dim() == 0


@lru_cache(maxsize=64)
def _fits(element: ElementFormat, dtype: torch.dtype) -> bool:
    """Whether every level is a number of `dtype`."""
    levels = torch.tensor(element.levels)
    return bool((levels.to(dtype).to(torch.float32) == levels).all())


def room_for_scales(
    x: Tensor, spec: QuantSpec, grouping: Grouping, largest: Callable[[bool], Tensor]
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(block scales to be written, amax of the outer level that was measured or None, outer scales).

    x         [R, C] the matrix;  grouping   of it
    largest   its amax as a kernel measures it: [R, 1] if told "by row", else [1, 1]
    """
    rows, cols = x.shape
    shape = (rows // spec.shape[0], cols // spec.shape[1])
    dtype = torch.float32 if spec.format.scale.name == "fp32" else torch.uint8
    stored = torch.empty(shape, dtype=dtype, device=x.device)
    outer, outers = None, torch.ones((), device=x.device)
    if spec.above == "tensor":
        outer = grouping.outer_amax(largest(False))
    elif spec.above == "row":
        outer, outers = grouping.outer_amax(largest(True)), torch.empty((rows, 1), device=x.device)
    elif isinstance(spec.above, tuple):
        outers = torch.empty((rows, cols // spec.above[1]), device=x.device)
    elif isinstance(spec.rule, Floor) or (isinstance(spec.rule, Ceil) and spec.rule.of == "amax"):
        common = spec.rule.headroom if isinstance(spec.rule, Floor) else 1.0 / spec.format.element.max
        outers = torch.full((), scales.fp32(common), device=x.device)
    return stored, outer, outers
