"""GEMMs of operands in parts against the reference: on exactly summable inputs equal, else to fp32's rounding."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fp4dist import numerics
from fp4dist.kernels.triton import parted
from fp4dist.numerics import BlockScaledTensor
from fp4dist.numerics.matmul import Operand
from fp4dist.numerics.tensor import Carrier, Chosen, PartedTensor
from fp4dist.spec.formats import NVFP4
from fp4dist.spec.operand import QuantSpec
from tests.generators import exactly_summable, normal

M, N, K = 48, 32, 256
MULTIPLY = numerics.matmul


def whole_numbers(rows: int, columns: int, seed: int) -> Tensor:
    """[rows, columns] fp32 quarters up to 4, most of them 0."""
    x = torch.randint(-16, 17, (rows, columns), generator=torch.Generator().manual_seed(seed)).float() / 4
    return torch.where(x.abs() > 2, x, 0.0)


def sides(rows: int, seed: int) -> dict[str, Tensor | None]:
    """What stands beside codes: nothing, a matrix, one row for all, one column for all."""
    x = whole_numbers(rows, K, seed)
    return {
        "none": None,
        "dense": x,
        "row": x[:1].expand(rows, K),
        "column": x[:, :1].expand(rows, K),
    }


@pytest.mark.parametrize("right", ["none", "dense", "row", "column"])
@pytest.mark.parametrize("left", ["none", "dense", "row", "column"])
def test_products_of_parts_are_the_references(left: str, right: str) -> None:
    a = PartedTensor(exactly_summable(M, K), sides(M, 2)[left])
    b = PartedTensor(exactly_summable(N, K, seed=1), sides(N, 3)[right])
    assert torch.equal(parted.matmul(a, b, MULTIPLY), numerics.matmul(a, b))


@pytest.mark.parametrize("which", ["left", "right", "both"])
def test_a_partner_is_met_in_place_of_the_value(which: str) -> None:
    a = PartedTensor(exactly_summable(M, K), whole_numbers(M, K, 4))
    b = PartedTensor(exactly_summable(N, K, seed=1), whole_numbers(N, K, 5))
    a = replace(a, partner=whole_numbers(M, K, 6)) if which != "right" else a
    b = replace(b, partner=whole_numbers(N, K, 7)) if which != "left" else b
    assert torch.equal(parted.matmul(a, b, MULTIPLY), numerics.matmul(a, b))


@pytest.mark.parametrize("rotation", [1, 16])
def test_sides_of_fp32_lose_nothing_to_bf16(rotation: int) -> None:
    codes = [replace(exactly_summable(rows, K, seed=rows), rotation=rotation) for rows in (M, N)]
    a, b = (PartedTensor(q, normal(q.shape[0], K, seed=9 + q.shape[0])) for q in codes)
    exact = sum(
        x.double() @ y.double().t() / rotation
        for x in (values(codes[0]), a.side)
        for y in (values(codes[1]), b.side)
        if x is not None and y is not None
    )
    found = parted.matmul(a, b, MULTIPLY).double()
    assert isinstance(exact, Tensor)
    size = (values(codes[0]).abs() + a.side.abs()) @ (values(codes[1]).abs() + b.side.abs()).t() / rotation  # type: ignore[union-attr]
    assert ((found - exact).abs() <= 3 * K * 2.0**-24 * size.double()).all()
    without = parted.matmul(replace(a, side=a.side.bfloat16()), b, MULTIPLY).double()  # type: ignore[union-attr]
    assert not ((without - exact).abs() <= 3 * K * 2.0**-24 * size.double()).all()


def test_an_operand_without_codes_meets_a_side() -> None:
    plain = whole_numbers(M, K, 8).bfloat16()
    b = PartedTensor(exactly_summable(N, K), whole_numbers(N, K, 9))
    assert torch.equal(parted.matmul(plain, b, MULTIPLY), numerics.matmul(plain, b))
    assert torch.equal(parted.matmul(b, plain, MULTIPLY), numerics.matmul(b, plain))


@pytest.mark.parametrize("draws", [(1, 2), (2, 1), (2, 2)])
def test_draws_are_averaged(draws: tuple[int, int]) -> None:
    a, b = (several(rows, number) for rows, number in zip((M, N), draws, strict=True))
    expected = numerics.matmul(a, b)
    assert torch.equal(parted.mean_of_samples(a, b, MULTIPLY), expected)
    total = torch.ones(M, N)
    assert parted.mean_of_samples(a, b, MULTIPLY, into=total) is total
    assert torch.equal(total, expected + 1)


def several(rows: int, number: int) -> BlockScaledTensor:
    """`number` draws side by side."""
    first = exactly_summable(rows, K, seed=rows)
    codes = [exactly_summable(rows, K, seed=rows + 100 * i).codes for i in range(number)]
    return replace(first, codes=torch.cat(codes, dim=1), samples=number)


def test_matrices_in_fp32_are_multiplied_in_three_terms() -> None:
    x, y = normal(M, K), normal(N, K, seed=5)
    exact, size = x.double() @ y.double().t(), x.double().abs() @ y.double().abs().t()
    assert ((parted.in_terms(x, y, MULTIPLY, (True, True)) - exact).abs() <= K * 2.0**-24 * size).all()
    narrow = y.bfloat16()
    assert ((parted.in_terms(x, narrow, MULTIPLY, (True, False)) - x.double() @ narrow.double().t()).abs().max()) < 1e-4
    assert parted.has_terms(x)
    assert not parted.has_terms(narrow)


def test_the_product_is_added_or_rounded_once() -> None:
    a = PartedTensor(exactly_summable(M, K), whole_numbers(M, K, 1))
    b = exactly_summable(N, K)
    total = torch.ones(M, N)
    assert parted.matmul(a, b, MULTIPLY, into=total) is total
    assert torch.equal(total, numerics.matmul(a, b) + 1)
    assert torch.equal(parted.matmul(a, b, MULTIPLY, out=torch.bfloat16), numerics.matmul(a, b).bfloat16())


class Counted:
    """The reference's GEMM, and 2 M N K of all its calls."""

    def __init__(self) -> None:
        self.flops = 0

    def __call__(self, a: Operand, b: Operand, **named: Tensor | None) -> Tensor:
        self.flops += 2 * a.shape[0] * b.shape[0] * a.shape[1]
        return numerics.matmul(a, b, **named)  # type: ignore[arg-type]


NUMBERS = torch.tensor([3, 17, 40, 41, 99, 130, 131, 255])


def only(x: Tensor, dim: int) -> Tensor:
    """Zero but for the chosen columns (dim 1) or rows (0)."""
    numbers = NUMBERS if dim else NUMBERS[x.shape[0] > NUMBERS]
    return torch.zeros_like(x).index_copy_(dim, numbers, x.index_select(dim, numbers))


def cleared(q: BlockScaledTensor) -> BlockScaledTensor:
    """Without codes in the chosen columns."""
    low = torch.zeros(q.shape[1], dtype=torch.bool).index_fill_(0, NUMBERS, True)
    keep = torch.where(low.view(-1, 2), 0, torch.tensor([0x0F, 0xF0])).sum(1).to(torch.uint8)
    return replace(q, codes=q.codes & keep)


def test_chosen_columns_meet_a_partner_or_another_side_alone() -> None:
    q, r = exactly_summable(M, K), exactly_summable(N, K, seed=1)
    x, y = (only(whole_numbers(rows, K, rows), 1) for rows in (M, N))
    residual = PartedTensor(q, x, None, Chosen(NUMBERS, 1, cleared=False))
    multiply = Counted()
    b = PartedTensor(r, None, y.bfloat16(), Chosen(NUMBERS, 1, cleared=False))
    assert torch.equal(parted.matmul(residual, b, multiply), numerics.matmul(residual, b))
    assert multiply.flops == 2 * M * N * (K + 3 * len(NUMBERS))  # the side's three terms in one GEMM
    multiply = Counted()
    a = PartedTensor(cleared(q), x.bfloat16(), None, Chosen(NUMBERS, 1, cleared=True))
    b = PartedTensor(cleared(r), y.bfloat16(), None, Chosen(NUMBERS, 1, cleared=True))
    assert torch.equal(parted.matmul(a, b, multiply), numerics.matmul(a, b))
    assert multiply.flops == 2 * M * N * (K + len(NUMBERS))
    for other in (Chosen(NUMBERS.clone(), 1, cleared=True), Chosen(NUMBERS, 1, cleared=False)):
        b = PartedTensor(r, y.bfloat16(), None, other)  # which has codes there
        assert torch.equal(parted.matmul(a, b, MULTIPLY), numerics.matmul(a, b))
        assert torch.equal(parted.matmul(b, a, MULTIPLY), numerics.matmul(b, a))


@pytest.mark.parametrize("partner", [True, False])
def test_chosen_rows_are_rows_and_columns_of_the_product(partner: bool) -> None:
    numbers = NUMBERS[NUMBERS < N]
    a = PartedTensor(exactly_summable(M, K), None, whole_numbers(M, K, 6) if partner else None)
    b = PartedTensor(exactly_summable(N, K, seed=1), only(whole_numbers(N, K, 5), 0), None, Chosen(numbers, 0, True))
    multiply = Counted()
    assert torch.equal(parted.matmul(a, b, multiply), numerics.matmul(a, b))
    assert torch.equal(parted.matmul(b, a, multiply), numerics.matmul(b, a))
    assert multiply.flops == 4 * M * K * (N + (6 if partner else 3) * len(numbers))


def test_sides_stand_behind_the_codes_where_columns_have_factors() -> None:
    """In one GEMM, whose sums are those of the reference: to fp32's rounding, and without codes of chosen columns."""
    of = QuantSpec(format=NVFP4, outer=(1, 128))
    here = torch.zeros(K, dtype=torch.bool).index_fill_(0, NUMBERS, True)
    operands = []
    for rows in (M, N):
        x = normal(rows, K, seed=rows) * torch.exp2(normal(rows, 1, seed=2))
        parts = torch.where(here, 0.0, x), torch.where(here, x, 0.0).bfloat16()
        q = numerics.quantize(parts[0], of)
        q = replace(q, carrier=near_carrier(q))
        operands.append(PartedTensor(q, parts[1], None, Chosen(NUMBERS, 1, cleared=True)))
    a, b = operands
    seen: list[tuple[Operand, Operand]] = []

    def multiply(x: Operand, y: Operand, **named: Any) -> Tensor:
        seen.append((x, y))
        return numerics.matmul(x, y, **named)

    expected = numerics.matmul(a, b)
    found = parted.matmul(a, b, multiply)
    assert [x.shape[1] for pair in seen for x in pair] == [K + 128] * 2  # filled up to a whole segment
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    total = torch.ones(M, N)
    assert parted.matmul(a, b, multiply, into=total) is total
    torch.testing.assert_close(total, expected + 1, rtol=1e-5, atol=1e-4)


def near_carrier(q: BlockScaledTensor) -> Carrier:
    """Values in bf16 with the powers of two of the outer scales, and factors in [1, 2) beside them."""
    power = torch.exp2(q.global_scale.frexp().exponent.float() - 1)
    values = numerics.dequantize(replace(q, global_scale=power)).bfloat16()
    return Carrier(values, torch.ones(()), rows=q.global_scale / power, near=True)


def test_sides_in_the_original_basis_meet_a_partner_in_it_alone() -> None:
    numbers, q, r = NUMBERS[NUMBERS < N], replace(exactly_summable(M, K), rotation=16), exactly_summable(N, K, seed=1)
    a = PartedTensor(q, None, whole_numbers(M, K, 6), None, straight=True)
    b = PartedTensor(replace(r, rotation=16), only(whole_numbers(N, K, 5), 0), None, Chosen(numbers, 0, True), True)
    assert a.partner is not None
    assert b.side is not None
    expected = numerics.matmul(q, b.main) + a.partner @ b.side.t()
    for product in (numerics.matmul, partial(parted.matmul, multiply=MULTIPLY)):
        assert torch.equal(product(a, b), expected)
        assert torch.equal(product(b, a), expected.t())
        for other in (q, replace(a, straight=False), replace(a, partner=None)):
            with pytest.raises(ValueError, match="original basis"):
                product(other, b)
    with pytest.raises(ValueError, match="original basis"):
        numerics.dequantize(b)


def values(q: BlockScaledTensor) -> Tensor:
    """[R, K] fp32, in the basis of the codes, not normalized."""
    return numerics.dequantize(replace(q, rotation=1))
