"""What cuBLASLt is asked for, as far as it can be told without a GPU; tests/kernels/triton/gemm_parity.py runs it."""

from __future__ import annotations

import ctypes

import pytest
import torch

from fp4dist.kernels import cublaslt

BF16, E5M2, E4M3, FP32 = torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn, torch.float32


def _matrix(rows: int, columns: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(rows, columns).to(dtype)


def test_a_cpu_is_refused_with_the_reason() -> None:
    assert "needs an NVIDIA GPU" in str(cublaslt.why_not(torch.device("cpu")))


def test_the_heuristics_result_has_the_size_of_the_c_structure() -> None:
    assert ctypes.sizeof(cublaslt._Heuristic) == 96


@pytest.mark.parametrize(("shape", "turn", "expected"), [((6, 8), False, (False, 8)), ((8, 6), True, (True, 6))])
def test_rows_or_columns_without_gaps(shape: tuple[int, int], turn: bool, expected: tuple[bool, int]) -> None:
    x = _matrix(*shape)
    assert cublaslt._layout(x.t() if turn else x) == expected


def test_a_part_of_a_matrix_keeps_its_row_length_and_gaps_are_refused() -> None:
    assert cublaslt._layout(_matrix(6, 8)[:, :4]) == (False, 8)
    assert cublaslt._layout(_matrix(6, 8)[::2, ::2]) is None
    assert cublaslt._layout(_matrix(1, 8).expand(6, 8)) is None


def test_alignment_is_the_largest_power_of_two_of_an_address() -> None:
    assert [cublaslt._alignment(address) for address in (512, 256, 48, 2)] == [256, 256, 16, 2]


def test_the_problem_of_bf16_operands() -> None:
    problem = cublaslt._problem(_matrix(6, 7), _matrix(7, 5).t(), BF16, None)
    assert problem is not None
    assert problem[1:4] == (6, 5, 7)
    assert (problem.turned_a, problem.ld_a, problem.turned_b, problem.ld_b) == (False, 7, True, 5)
    assert problem.type_d == BF16
    summed = cublaslt._problem(_matrix(6, 7), _matrix(5, 7), FP32, torch.zeros(6, 5))
    assert summed is not None
    assert summed.type_d == FP32


def test_fp8_only_where_the_library_has_it() -> None:
    def takes(a: torch.Tensor, b: torch.Tensor) -> bool:
        return cublaslt._problem(a, b, FP32, None) is not None

    assert takes(_matrix(32, 64, E4M3), _matrix(16, 64, E4M3))
    assert takes(_matrix(32, 64, E5M2), _matrix(16, 64, E4M3))
    assert takes(_matrix(37, 64, E5M2), _matrix(16, 64, E4M3))
    assert not takes(_matrix(32, 64, E5M2), _matrix(20, 64, E4M3))
    assert not takes(_matrix(32, 64, E5M2), _matrix(16, 64, E5M2))  # no tensor-core kernel of theirs
    assert not takes(_matrix(32, 40, E4M3), _matrix(16, 40, E4M3))  # rows of 16 bytes
    assert not takes(_matrix(64, 32, E4M3).t(), _matrix(16, 64, E4M3))  # along K only
    assert not takes(_matrix(32, 64, BF16), _matrix(16, 64, E4M3))


def test_other_types_empty_matrices_and_strided_sums_are_left_to_others() -> None:
    assert cublaslt._problem(_matrix(4, 8, FP32), _matrix(4, 8, FP32), FP32, None) is None
    assert cublaslt._problem(_matrix(0, 8), _matrix(4, 8), FP32, None) is None
    assert cublaslt._problem(_matrix(4, 8), _matrix(4, 8), FP32, torch.zeros(4, 8)[:, ::2]) is None


def test_a_tile_is_preferred_only_where_it_was_measured() -> None:
    def preferred(m: int, n: int, k: int, dtype: torch.dtype = BF16) -> int | None:
        problem = cublaslt._problem(torch.empty(m, k, dtype=dtype), torch.empty(n, k, dtype=dtype), BF16, None)
        assert problem is not None
        return cublaslt._preferred_tile(problem)

    assert preferred(16384, 4096, 64) == cublaslt._TILE_201
    assert preferred(1024, 4096, 64) is None
    assert preferred(16384, 4096, 64, E4M3) is None
