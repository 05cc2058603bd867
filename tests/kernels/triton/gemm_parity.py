"""Where the GEMMs on carriers differ from exact products: on a GPU, or on a CPU in Triton's interpreter.

    TRITON_INTERPRET=1 python -m tests.kernels.triton.gemm_parity      # exit status 1 if anything differs

The interpreter is chosen when the kernels are first imported, so tests without a GPU run this file as a program.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fp4dist import numerics
from fp4dist.kernels.triton import grouped
from fp4dist.kernels.triton.gemm import Side, gemm
from fp4dist.kernels.triton.matmul import grouped_matmul, matmul
from fp4dist.numerics import Key
from fp4dist.numerics.matmul import Operand, _factors
from fp4dist.numerics.tensor import BlockScaledTensor, Carrier
from tests.generators import exactly_summable, normal, spec

BF16, E5M2, E4M3, FP32 = torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn, torch.float32
SHAPES = ((37, 70, 150), (1, 5, 31), (64, 128, 256), (130, 96, 17))  # M, N, K
PAIRS = ((BF16, BF16), (E5M2, E5M2), (E5M2, E4M3), (E4M3, E5M2), (E4M3, E4M3))
TERMS = 200  # nonzero products in a sum of `few_terms`


def few_terms(rows: int, columns: int, seed: int = 0) -> Tensor:
    """[rows, columns] multiples of 1/2 up to 3 in magnitude, all but TERMS columns zero.

    A sum of their products is a multiple of 1/4 below 9 * 200 < 2^13 / 4 in magnitude, in any order: exact in the
    accumulator of Hopper's FP8 tensor cores too.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-6, 7, (rows, columns), generator=generator) / 2
    kept = torch.zeros(columns, dtype=torch.bool)
    kept[torch.randperm(columns, generator=torch.Generator().manual_seed(1))[:TERMS]] = True
    return x * kept


def of_gemms(device: torch.device) -> Iterator[str]:
    """The Triton GEMM: every pair of types, ragged sizes, every factor, both outputs, sums taken up."""
    cases = [(SHAPES[0], pair, True, True, 1) for pair in PAIRS]
    cases += [(shape, pair, False, False, 1) for shape in SHAPES[1:] for pair in PAIRS[:2]]
    cases += [(SHAPES[0], PAIRS[1], True, False, 16)]
    scales = torch.tensor([0.375, 1.5])
    for (m, n, k), (left, right), with_scales, with_rows, rotation in cases:
        a, b = few_terms(m, k), few_terms(n, k, seed=2)
        rows_a, rows_b = (torch.exp2(torch.arange(r).remainder(5).float() - 2)[:, None] for r in (m, n))
        exact = a.double() @ b.double().t() / rotation
        exact = exact * scales.double().prod() if with_scales else exact
        exact = exact * rows_a.double() * rows_b.double().t() if with_rows else exact
        one, other = (
            Side(
                values.to(dtype).to(device),
                scales[i].to(device) if with_scales else None,
                rows.to(device) if with_rows else None,
            )
            for i, (values, dtype, rows) in enumerate(((a, left, rows_a), (b, right, rows_b)))
        )
        what = f"gemm {left} x {right} {(m, n, k)} scales {with_scales} rows {with_rows}"
        yield from _unlike_exact(what, exact, partial(gemm, one, other, rotation), device)


def of_products(device: torch.device) -> Iterator[str]:
    """`matmul` of every kind of operand, against the reference where sums are exact."""
    codes, others = exactly_summable(48, 256), exactly_summable(80, 256, seed=1)
    wide = Carrier(numerics.dequantize(others).to(BF16), torch.tensor(0.5), 1)
    fp8 = [Carrier(few_terms(r, 256, seed=r).to(E5M2), torch.tensor(2.0), 1) for r in (48, 80)]
    finer = Carrier(few_terms(80, 256, seed=8).to(E4M3), torch.tensor(0.25), 1)
    of_rows = torch.exp2(torch.arange(48).remainder(4).float())[:, None]
    rows, halves = (replace(fp8[0], rows=of_rows.expand(48, n).contiguous()) for n in (1, 2))
    parted, others_parted = (
        replace(c, rows=torch.exp2(torch.arange(r * n).remainder(3).float()).reshape(r, n))
        for c, r, n in ((wide, 80, 4), (_of(codes), 48, 4))
    )
    near, others_near = (  # parts of 128
        replace(c, rows=torch.exp2(torch.arange(r * 2).remainder(3).float()).reshape(r, 2), near=True)
        for c, r in ((wide, 80), (_of(codes), 48))
    )
    plain = few_terms(80, 256, seed=5).to(BF16)
    turned = few_terms(256, 80, seed=6).to(BF16).t()
    cases: dict[str, tuple[Operand, Operand]] = {
        "codes x codes": (codes, others),
        "codes x carrier": (codes, wide),
        "codes at whose side a carrier is": (replace(codes, carrier=_of(codes)), others),
        "codes x plain": (codes, plain),
        "codes x turned plain": (codes, turned),
        "turned plain x carrier": (turned, wide),
        "plain fp32 x codes": (plain.float(), codes),
        "plain x plain": (plain, turned),
        "fp8 x fp8": (fp8[0], fp8[1]),
        "fp8 x fp8 of another type": (fp8[0], finer),
        "fp8 of odd rows x fp8 of another type": (
            Carrier(few_terms(45, 256, seed=9).to(E5M2), torch.tensor(2.0)),
            finer,
        ),
        "fp8 with rows x fp8 of another type": (rows, finer),
        "fp8 with rows x fp8": (rows, fp8[1]),
        "parts of rows x parts of rows": (others_parted, parted),
        "parts of rows x plain": (others_parted, plain),
        "near parts of rows x near parts of rows": (others_near, near),
        "near parts of turned rows x plain": (replace(others_near, rows=others_near.rows.t().contiguous().t()), plain),
        "plain x near parts of rows": (few_terms(48, 256, seed=7).to(BF16), near),
        "rows x near parts of rows": (replace(_of(codes), rows=of_rows), near),
        "near parts of rows x other parts of rows": (others_near, parted),
        "fp8 rows x parts of rows": (rows, parted),
        "fp8 parts of rows x fp8": (halves, fp8[1]),
        "fp8 x bf16": (fp8[0], plain),
        "codes x fp8": (codes, fp8[1]),
        "in a rotated basis": (replace(codes, rotation=16), replace(others, rotation=16)),
        "carriers in a rotated basis": (replace(fp8[0], rotation=16), replace(fp8[1], rotation=16)),
    }
    for name, (a, b) in cases.items():
        exact = numerics.matmul(a, b).double()
        pair = _moved(a, device), _moved(b, device)
        yield from _unlike_exact(f"matmul {name}", exact, partial(matmul, *pair), device)
    left, right = ([_moved(pair[i], device) for pair in cases.values()] for i in (0, 1))
    sums = [torch.ones(a.shape[0], b.shape[0], device=device) for a, b in zip(left, right, strict=True)]
    for name, one, total in zip(
        cases, grouped_matmul(left, right), grouped_matmul(left, right, into=sums), strict=True
    ):
        exact = numerics.matmul(*cases[name]).double()
        if not (torch.equal(one.double().cpu(), exact) and torch.equal(total.double().cpu(), exact + 1)):
            yield f"grouped_matmul {name}"


def of_random_products(device: torch.device) -> Iterator[str]:
    """Sums that round: within K 2^-24 of the sum of magnitudes."""
    for name in ("nvfp4", "mxfp4", "eden"):
        q = [numerics.quantize(normal(r, 256, seed=r), spec(name), Key(slot=2)) for r in (48, 80)]
        a, b = (numerics.dequantize(x).double() for x in q)
        found = matmul(*(_moved(x, device) for x in q)).double().cpu()
        bound = (256 + 4) * 2.0**-24 * (a.abs() @ b.abs().t()) + 1e-30
        if not ((found - a @ b.t()).abs() <= bound).all():
            yield f"matmul of random {name}"


def of_scaled_segments(device: torch.device) -> Iterator[str]:
    """Factors in [1, 2), and the tiny and huge values whose powers of two are in the carrier: within the same bound."""
    rows = 1 + torch.rand(48, 3, generator=torch.Generator().manual_seed(4))
    a = Carrier(normal(48, 384).to(BF16), torch.tensor(0.5), 1, rows, near=True)
    big = normal(80, 384, seed=1).to(BF16) * torch.exp2(torch.arange(80).remainder(3) * 40.0 - 40)[:, None]
    big[:, 128:256] = 0
    b = Carrier(big.to(BF16), torch.tensor(2.0), 1, 1 + torch.rand(80, 3), near=True)
    left, right = (_factors(x).inner.double() for x in (a, b))
    bound = (384 + 4) * 2.0**-24 * (left.abs() @ right.abs().t())
    if not ((matmul(_moved(a, device), _moved(b, device)).double().cpu() - left @ right.t()).abs() <= bound).all():
        yield "matmul of segments with factors"


def of_groups(device: torch.device) -> Iterator[str]:
    """Products of experts in one launch, of ragged, empty and odd sizes: those of a loop, where sums are exact."""
    for kind in ("plain", "rows", "parts"):
        pairs = []
        for i, (m, n, k) in enumerate(((70, 40, 256), (0, 40, 256), (3, 40, 384), (130, 65, 256), (0, 9, 128))):
            sides = []
            for r, seed in ((m, i), (n, i + 9)):
                rows = torch.exp2(torch.arange(r * 3 * (k // 128)).remainder(3).float()).reshape(r, 3 * (k // 128))
                of = {"plain": None, "rows": rows[:, :1].contiguous(), "parts": rows[:, : k // 128].contiguous()}[kind]
                sides.append(Carrier(few_terms(r, k, seed).to(BF16), torch.tensor(0.5), 1, of, near=kind == "parts"))
            pairs.append(sides)
        if kind == "plain":  # K of an expert's tokens, rows that begin anywhere
            pairs.append([Carrier(few_terms(r, 37, r).to(BF16), torch.tensor(1.0)) for r in (20, 30)])
        a, b = ([_moved(pair[i], device) for pair in pairs] for i in (0, 1))
        exact = [numerics.matmul(x, w) if len(x.values) else torch.zeros(0, len(w.values)) for x, w in pairs]
        sums = [torch.ones(x.shape, device=device) for x in exact]
        grouped.allow()
        found = grouped_matmul(a, b), grouped_matmul(a, b, out=BF16), grouped_matmul(a, b, into=sums)
        grouped.allow(False)
        for i, (one, rounded, total, x) in enumerate(zip(*found, exact, strict=True)):
            same = torch.equal(one.cpu(), x) and torch.equal(rounded.cpu(), x.to(BF16)) and total is sums[i]
            if not (same and torch.equal(total.cpu(), x + 1)):
                yield f"group of {kind}: product {i}"


def of_groups_that_round(device: torch.device) -> Iterator[str]:
    """Operands in parts in one launch: the very bits of one product after the other. Others are multiplied alone."""
    sizes = ((70, 256), (33, 256), (64, 384))
    near = [
        [
            Carrier(normal(r, k, seed=r + k).to(BF16), torch.tensor(0.75), 1, 1 + torch.rand(r, k // 128), near=True)
            for r in (m, 40)
        ]
        for m, k in sizes
    ]
    a, b = ([_moved(pair[i], device) for pair in near] for i in (0, 1))
    sides = [[Side(x.values, x.scale, x.rows, x.near) for x in several] for several in (a, b)]  # type: ignore[union-attr]
    if not grouped.is_wanted(*sides) or grouped.is_wanted(*([s._replace(rows=None) for s in some] for some in sides)):
        yield "one launch for other products than those in parts"
    for i, (one, x, w) in enumerate(zip(grouped_matmul(a, b), a, b, strict=True)):
        if not torch.equal(one, matmul(x, w)):
            yield f"product {i} of a group that rounds"


def of_graphs(device: torch.device) -> Iterator[str]:
    """On a GPU: captured once, replayed on new operands, with `out` and with `into`."""
    if device.type != "cuda":
        return
    for dtype in (BF16, E5M2):
        a, b = (
            Carrier(few_terms(r, 256, seed=r).to(dtype).to(device), torch.tensor(0.5, device=device)) for r in (64, 96)
        )
        total = torch.zeros(64, 96, device=device)
        matmul(a, b, into=total)
        matmul(a, b, out=BF16)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            product = matmul(a, b, out=BF16)
            matmul(a, b, into=total)
        total.zero_()
        exact = torch.zeros(64, 96, dtype=torch.float64)
        for step in range(2):
            a.values.copy_(few_terms(64, 256, seed=step).to(dtype))
            a.scale.fill_(1.0 + step)
            graph.replay()
            exact += numerics.matmul(_moved(a, "cpu"), _moved(b, "cpu")).double()
        if not torch.equal(total.double().cpu(), exact):
            yield f"captured product into a sum, {dtype}"
        last = numerics.matmul(_moved(a, "cpu"), _moved(b, "cpu"), out=BF16)
        if not torch.equal(product.cpu(), last):
            yield f"captured product, {dtype}"


def _unlike_exact(what: str, exact: Tensor, product: Callable[..., Tensor], device: torch.device) -> Iterator[str]:
    """In fp32, rounded once to bf16, added to a tensor: which of them is not `exact`, a matrix that fp32 holds."""
    start = torch.randint(-8, 9, exact.shape, generator=torch.Generator().manual_seed(9)).float()
    total = start.to(device, copy=True)
    if not torch.equal(product(out=FP32).cpu().double(), exact):
        yield f"{what}: fp32"
    if not torch.equal(product(out=BF16).cpu(), exact.to(BF16)):
        yield f"{what}: bf16"
    if product(into=total) is not total or not torch.equal(total.cpu(), (start.double() + exact).float()):
        yield f"{what}: into"


def _of(q: BlockScaledTensor) -> Carrier:
    return Carrier(numerics.dequantize(q).to(BF16), torch.ones(()))


def _moved(x: Operand, device: torch.device | str) -> Operand:
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, Carrier):
        rows = None if x.rows is None else x.rows.to(device)
        return replace(x, values=x.values.to(device), scale=x.scale.to(device), rows=rows)
    assert isinstance(x, BlockScaledTensor)
    beside = None if x.carrier is None else _moved(x.carrier, device)
    return replace(
        x, codes=x.codes.to(device), scales=x.scales.to(device), global_scale=x.global_scale.to(device),
        carrier=beside,  # type: ignore[arg-type]
    )  # fmt: skip


CHECKS = (
    of_gemms, of_products, of_random_products, of_scaled_segments, of_groups, of_groups_that_round, of_graphs,
)  # fmt: skip


def main() -> int:
    """Print every difference."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    found = [difference for check in CHECKS for difference in check(device)]
    print("\n".join(found) if found else f"no difference on {device}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
