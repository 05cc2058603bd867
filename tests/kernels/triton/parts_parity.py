"""Where what Triton takes out of operands, or its terms of fp32, differ from the reference: on a GPU, or interpreted.

TRITON_INTERPRET=1 python -m tests.kernels.triton.parts_parity      # exit status 1 if anything differs
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fp4dist import numerics
from fp4dist.kernels.triton import chosen, clamped, largest, matmul, parted, slopes, terms
from fp4dist.numerics import BlockScaledTensor, estimators, quantize, splits
from fp4dist.numerics.matmul import OperandParts
from fp4dist.numerics.splits import Place
from fp4dist.numerics.tensor import PartedTensor
from fp4dist.spec.estimators import Dge
from fp4dist.spec.formats import E1M2, E2M1, FP4_ROW, MXFP4, NVFP4
from fp4dist.spec.operand import QuantSpec
from fp4dist.spec.splits import Occ, TopK
from tests.generators import families, normal


def differences(device: torch.device) -> Iterator[str]:
    """All of them."""
    yield from of_quantiles(device)
    yield from of_terms(device)
    yield from of_slopes(device)
    yield from of_products(device)
    yield from of_channels(device)
    yield from of_residuals(device)
    yield from of_largest(device)


def of_quantiles(device: torch.device) -> Iterator[str]:
    """Rest and side of rows of usual and unusual lengths and contents."""
    for name, x in matrices():
        for alpha, compensate in ((0.9, True), (0.99, False)):
            spec = QuantSpec(format=FP4_ROW, outlier=Occ(alpha=alpha, compensate=compensate))
            expected = splits.decompose(x, spec, Place(token_dim=0))
            found = clamped.decompose(x.to(device), spec, Place(token_dim=0))
            for what, ours, theirs in zip(("rest", "side"), found, expected, strict=True):
                if theirs is None and ours is None:
                    continue
                if ours is None or theirs is None or not same(ours, theirs):
                    yield f"{name} alpha {alpha}: {what}"


def matrices() -> Iterator[tuple[str, Tensor]]:
    """bf16: families, zeros of both signs, rows with NaN and Inf beyond and within their quantiles."""
    for name, x in families(16, 160).items():
        yield name, x.bfloat16()
    for columns in (1, 2, 100, 256, 5000):
        yield f"{columns} columns", normal(3, columns, seed=columns).bfloat16()
    yield "wide", normal(2, clamped.COLUMNS, seed=4).bfloat16()
    sparse = torch.where(normal(8, 200, seed=1) > 1.9, normal(8, 200, seed=2), 0.0)
    yield "zeros of both signs", (sparse * torch.tensor([1.0, -1.0]).repeat(100)).bfloat16()
    special = normal(6, 200, seed=3).bfloat16()
    special[0, 3], special[1, :2] = float("nan"), float("inf")
    special[2, 5], special[3, :100] = -float("inf"), float("nan")
    special[4, ::3], special[5, ::7] = float("inf"), -float("nan")
    yield "not finite", special
    yield "cut out", normal(8, 512, seed=5).bfloat16()[:, 128:328]


def of_slopes(device: torch.device) -> Iterator[str]:
    """On levels, between them, beyond the grid, and what is not finite. fp64 powers may differ in their last bit
    between a GPU and a CPU, and so may one fp32 in very many.
    """
    u = torch.cat([normal(40, 1000), torch.linspace(-7, 7, 2801).float()[:2000].view(2, 1000)])
    u[0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    for element, dge in ((E2M1, Dge()), (E2M1, Dge(k=3, cap=2)), (E1M2, Dge())):
        found, expected = slopes.slope(u.to(device), element, dge), estimators.slope(u.to(device), element, dge).cpu()
        if not same(found, expected):
            yield f"slopes of {element.name} {dge}"


def of_products(device: torch.device) -> Iterator[str]:
    """Codes under scales of rows with a side, whose own product FP8 tensor cores take; others stay as they are."""
    row, tensor = QuantSpec(format=FP4_ROW), QuantSpec(format=NVFP4)
    if device.type == "cpu":
        matmul.multiplies_fp8 = lambda device: True  # which would ask the device
    side = torch.where(normal(64, 256, seed=3).abs() > 2, normal(64, 256, seed=4), 0.0).bfloat16()
    for spec in (row, tensor):
        codes = [quantize(normal(rows, 256, seed=rows), spec) for rows in (64, 48)]
        q, w = (moved(q, device) for q in codes)
        a, in_fp8 = PartedTensor(q, side.to(device)), spec is row and matmul.multiplies_fp8(device)
        types = {getattr(OperandParts.of(x).main, "carrier", None) is not None for x in matmul.with_fp8(a, w)}
        if types != {in_fp8}:
            yield f"products of {spec.format.title}: carriers {types}"
        expected = numerics.matmul(PartedTensor(codes[0], side), codes[1])
        error = float((matmul.matmul(a, w).cpu() - expected).norm() / expected.norm())
        error = max(error, float((matmul.matmul(w, a).cpu() - expected.t()).norm() / expected.norm()))
        if not error <= (1e-3 if in_fp8 and device.type == "cuda" else 1e-6):  # whose sums in FP8 are shorter
            yield f"products of {spec.format.title}: {error:.1e}"


def of_channels(device: torch.device) -> Iterator[str]:
    """Channels taken out of rows and columns of either order in memory, and whole matrices in MXFP8."""
    wide = torch.cat([x.float() for x in families(16, 160).values()])
    edges = normal(70, 320, seed=6) * torch.exp2(torch.arange(70.0) * 4 - 149)[:, None]  # subnormal numbers to the end
    edges[:2, ::5], edges[2, 7], edges[3, 40], edges[4, 64:96] = -0.0, float("nan"), -float("inf"), 0.0
    edges[5, :64] = torch.tensor([3.3895e38, -1e-40]).repeat(32)
    for name, x in (("families", wide), ("edges", edges)):
        for dtype in (torch.bfloat16, torch.float32)[: 1 + (x is edges)]:
            rows, there = x.to(dtype), x.to(dtype).to(device)
            for form, y, z in (("rows", rows, there), ("columns", rows.t()[:, : len(x) // 32 * 32], there.t())):
                z, place = z[:, : y.shape[1]], Place(channels=torch.arange(y.shape[1]) % 7 == 3)
                text = f"{name} {dtype} {form}"
                if not same(
                    chosen.in_precision(z, "mxfp8", dtype, place), splits.in_precision(y, "mxfp8", dtype, place)
                ):
                    yield f"MXFP8 of {text}"
                for dim, precision in ((1, "mxfp8"), (0, "mxfp8"), (1, "bf16")):
                    marks = torch.arange(y.shape[dim]) % 7 == 3
                    expected = splits.take_channels(y, precision, Place(channels=marks, channel_dim=dim))
                    found = chosen.take_channels(z, precision, Place(channels=marks.to(device), channel_dim=dim))
                    if not all(map(same, found, expected)):
                        yield f"channels of {text}: dimension {dim}, {precision}"


def of_largest(device: torch.device) -> Iterator[str]:
    """Of groups of usual sizes, with ties, NaN and Inf, of rows in one piece and cut."""
    x = normal(12, 768, seed=8).bfloat16()
    x[:2], x[2, ::3], x[3, 5:20], x[4, 7] = x[:2].round(), -0.0, float("nan"), -float("inf")
    x[3, 19] = -float("nan")
    for k, group in ((2, 256), (1, 32), (5, 64)):
        spec = QuantSpec(format=NVFP4, outlier=TopK(k=k, group=group))
        for form, y in (("whole", x), ("cut", x[:, 256:512])):
            expected, found = splits.decompose(y, spec, Place()), largest.decompose(y.to(device), spec, Place())
            if not all(map(same, found, expected)):
                yield f"the {k} largest of {group}, {form}"


def of_residuals(device: torch.device) -> Iterator[str]:
    """Rounding errors of the chosen columns alone, of one scale a block or a square, of either kind."""
    marks = torch.arange(288) % 9 == 2
    for of in (QuantSpec(format=NVFP4), QuantSpec(format=NVFP4, block=(16, 16)), QuantSpec(format=MXFP4)):
        for dtype in (torch.bfloat16, torch.float32):
            x = (normal(48, 288, seed=2) * torch.exp2(torch.arange(48.0) - 24)[:, None]).to(dtype)
            x[7, 2] = float("nan") if of.format is MXFP4 else 0.0
            codes = quantize(x, of)
            expected = splits.hot_residual(x, codes, of, dtype, Place(channels=marks))
            there = x.to(device), moved(codes, device), of, dtype, Place(channels=marks.to(device))
            if not same(chosen.hot_residual(*there), expected):
                yield f"residual of {of.label()} {dtype}"


def moved(q: BlockScaledTensor, device: torch.device) -> BlockScaledTensor:
    """On a device."""
    parts = {name: getattr(q, name).to(device) for name in ("codes", "scales", "global_scale")}
    return replace(q, **parts, carrier=None)


def of_terms(device: torch.device) -> Iterator[str]:
    """Of dense matrices, transposed ones and cuts."""
    for name, x in [*families(16, 160).items(), ("odd", normal(7, 333))]:
        there = x.float().to(device)
        for form, y in (("rows", there), ("columns", there.t()), ("cut", there[:, 3:90])):
            found, expected = terms.split(y), parted.in_torch(y.cpu())
            if not all(same(a, b) for a, b in zip(found, expected, strict=True)):
                yield f"terms of {name} {form}"
            if form == "columns" and found[0].stride(0) != 1:
                yield f"terms of {name}: {found[0].stride()} are not columns"


def same(found: Tensor, expected: Tensor) -> bool:
    """Equal bits and types; any NaN is any other."""
    found, nan = found.cpu(), expected != expected
    kept = torch.where(nan, 0.0, found).to(expected.dtype), torch.where(nan, 0.0, expected).to(expected.dtype)
    equal = torch.equal(*kept) and torch.equal(kept[0].signbit(), kept[1].signbit())
    return found.dtype == expected.dtype and equal and torch.equal(found != found, nan)


def main() -> int:
    """Print every difference."""
    found = list(differences(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    print("\n".join(found) if found else "no difference in parts")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
