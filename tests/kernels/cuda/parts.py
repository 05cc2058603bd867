"""Where what csrc/ takes out of operands, its slopes or its terms of fp32 differ from the reference.

python -m tests.kernels.cuda.parts      # on a GPU with the extension built, else on a CPU; exit status 1 if one differs

The matrix is that of tests/kernels/triton/parts_parity.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fp4dist.kernels.cuda import parts
from fp4dist.numerics import splits
from fp4dist.numerics.splits import Parts, Place
from fp4dist.spec.formats import FP4_ROW, NVFP4
from fp4dist.spec.operand import QuantSpec
from fp4dist.spec.splits import Occ, TopK
from tests.generators import normal
from tests.kernels.cuda import emulated
from tests.kernels.triton import parts_parity


class Ours:
    """`clamped`, `largest`, `chosen`, `slopes` and `terms` of fp4dist.kernels.triton, as csrc does them."""

    COLUMNS = parts.LONGEST_ROW
    decompose = staticmethod(parts.decompose)
    take_channels = staticmethod(parts.take_channels)
    in_precision = staticmethod(parts.in_precision)
    hot_residual = staticmethod(parts.hot_residual)
    slope = staticmethod(parts.slope)
    split = staticmethod(parts.split_terms)


@contextmanager
def ours() -> Iterator[None]:
    """The matrix, with these kernels in place of Triton's."""
    theirs = {name: getattr(parts_parity, name) for name in ("clamped", "largest", "chosen", "slopes", "terms")}
    try:
        for name in theirs:
            setattr(parts_parity, name, Ours)
        yield
    finally:
        for name, module in theirs.items():
            setattr(parts_parity, name, module)


def of_edges(device: torch.device) -> Iterator[str]:
    """Medians, ranks up to all of a row, rows in every number of warps, limits that are zeros; groups of every size."""
    for columns in (8, 1024, 1032, 4100, 8200):
        x = normal(5, columns, seed=columns).bfloat16()
        x[0], x[1, ::2], x[2, :4], x[3, 0] = -0.0, 0.0, float("inf"), float("nan")
        x[1] = x[1] * torch.tensor([1.0, -1.0]).repeat(columns // 2)
        for alpha in (0.55, 0.999):
            spec = QuantSpec(format=FP4_ROW, outlier=Occ(alpha=alpha))
            expected, found = (
                splits.decompose(x, spec, Place(token_dim=0)), parts.decompose(x.to(device), spec, Place(token_dim=0)),
            )  # fmt: skip
            if not same(found, expected):
                yield f"limits of rows of {columns}, alpha {alpha}"
    for group in (8, 16, 128):
        spec = QuantSpec(format=NVFP4, outlier=TopK(k=3, group=group))
        x = normal(5, 3 * group, seed=group).bfloat16().round()
        expected, found = splits.decompose(x, spec, Place()), parts.decompose(x.to(device), spec, Place())
        if not same(found, expected):
            yield f"the 3 largest of {group}"


def of_doors(device: torch.device) -> Iterator[str]:
    """What the operators of the built extension refuse, as the emulator's do not: other types, sizes, orders."""
    ops, x = torch.ops.fp4dist, torch.zeros(4, 48, dtype=torch.bfloat16, device=device)
    marks, y = torch.zeros(48, dtype=torch.uint8, device=device), torch.empty_like(x)
    for what, error, call in (
        ("half", TypeError, lambda: ops.take_channels(x.half(), marks, False, False, y, y)),
        ("columns of half a block", ValueError, lambda: ops.take_channels(x, marks, False, True, y, y)),
        ("no rest", ValueError, lambda: ops.take_channels(x, marks, False, False, None, y)),
        ("few marks", ValueError, lambda: ops.take_channels(x, marks[:40], False, False, y, y)),
        ("a rank beyond the row", ValueError, lambda: ops.clamp_rows(x, 49, y, None)),
        ("columns in order", ValueError, lambda: ops.clamp_rows(x.t(), 1, y, None)),
        ("a group of 48", ValueError, lambda: ops.take_largest(x, 48, 2, y, y)),
        ("a small result", ValueError, lambda: ops.take_largest(x, 16, 2, y, y[:2])),
        ("one level", ValueError, lambda: ops.slope_offsets(x.float(), [0.0], y)),
        ("a term of fp32", TypeError, lambda: ops.split_terms(x.float(), y, y, y.float())),
        ("codes of another shape", ValueError, lambda: ops.hot_residual(x, marks, marks, x, marks, [1, 16], False, y)),
    ):
        try:
            call()
        except error:
            continue
        yield f"{what}: taken"


def same(found: Parts, expected: Parts) -> bool:
    """Equal bits of both, none where there is none."""
    beside = (expected.side is None) == (found.side is None)
    if found.side is not None and expected.side is not None:
        beside = parts_parity.same(found.side, expected.side)
    return beside and parts_parity.same(found.rest, expected.rest)


def differences(device: torch.device) -> Iterator[str]:
    """All of them."""
    with ours():
        for check in ("quantiles", "terms", "slopes", "channels", "residuals", "largest"):
            yield from getattr(parts_parity, f"of_{check}")(device)
    yield from of_edges(device)


def main(device: torch.device) -> int:
    """Print every difference."""
    found = list(differences(device))
    print("\n".join(found) if found else f"no difference in parts on {device}")
    return bool(found)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        emulated.load()
    sys.exit(main(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
