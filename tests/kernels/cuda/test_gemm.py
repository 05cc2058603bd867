"""The GEMMs of csrc/cutlass as far as a CPU goes: what they are given, and where CUTLASS's own layouts read it."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fp4dist import numerics
from fp4dist.errors import KernelUnavailable
from fp4dist.kernels.cuda import gemm, matmul
from fp4dist.numerics import codes as encodings
from fp4dist.numerics.layout import swizzle, unswizzle
from fp4dist.numerics.tensor import BlockScaledTensor
from fp4dist.spec.build import build
from fp4dist.spec.formats import E2M1
from fp4dist.spec.recipe import QuantSpec

ROOT = Path(__file__).resolve().parents[3]
LAYOUTS = Path(__file__).parent / "cutlass" / "layouts.cu"
SCHEMA = (
    "gemm(Tensor[] a, Tensor[] a_scales, Tensor[] b, Tensor[] b_scales, Tensor[] alpha, bool mx, bool add,"
    " Tensor(a!)[] out) -> ()"
)
calls: list[int] = []
error: list[float] = []  # in the last sum


def values(codes: Tensor, scales: Tensor, mx: bool) -> Tensor:
    """[rows, k] fp64 of what csrc/cutlass/gemm.h says an operand is."""
    rows, k = codes.shape[0], codes.shape[1] * 2
    block = 32 if mx else 16
    stored = unswizzle(scales, rows, k // block)
    scale = encodings.decode_e8m0(stored) if mx else encodings.decode_e4m3(stored)
    return encodings.decode_packed(codes, E2M1).double() * scale.double().repeat_interleave(block, 1)


def multiplied(
    a: list[Tensor], a_scales: list[Tensor], b: list[Tensor], b_scales: list[Tensor], alpha: list[Tensor], mx: bool,
    add: bool, out: list[Tensor],
) -> None:  # fmt: skip
    """What gemm.h says of a call, in fp64."""
    calls.append(len(a))
    for x, sx, w, sw, factor, to in zip(a, a_scales, b, b_scales, alpha, out, strict=True):
        product = values(x, sx, mx) @ values(w, sw, mx).t() * factor.double()
        product[-1, -1] += sum(error)
        to.copy_(to + product if add else product)


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operator of csrc/cutlass/bindings.cpp on CPU tensors, and its device there."""
    ops = torch.library.Library("fp4dist", "FRAGMENT")
    ops.define(SCHEMA)
    ops.impl("gemm", multiplied, "CPU")
    monkeypatch.setattr("fp4dist.kernels.cuda.decode.swizzled", lambda q: swizzle(q.scales, q.block[0]))
    calls.clear()
    error.clear()
    gemm._is_exact.cache_clear()
    yield
    gemm._is_exact.cache_clear()
    ops._destroy()


def operand(rows: int, columns: int, seed: int, **spec: Any) -> BlockScaledTensor:
    x = torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))
    q = numerics.quantize(x, build(QuantSpec, spec))
    assert isinstance(q, BlockScaledTensor)
    return q


def test_the_schema_is_that_of_the_bindings() -> None:
    text = (ROOT / "csrc" / "cutlass" / "bindings.cpp").read_text(encoding="utf-8")
    assert "".join(SCHEMA.split()) in "".join(text.replace('"', "").split())


@pytest.mark.parametrize("spec", [{"format": "nvfp4"}, {"format": "nvfp4", "block": [16, 16]}, {"format": "mxfp4"}])
def test_products_are_added_to_fp32_and_written_in_bf16(op: None, monkeypatch: pytest.MonkeyPatch, spec: Any) -> None:
    monkeypatch.setattr(gemm, "is_there", lambda device: True)
    pairs = [(operand(rows, 96, rows, **spec), operand(n, 96, n, **spec)) for rows, n in ((144, 32), (16, 160))]
    exact = [numerics.dequantize(a).double() @ numerics.dequantize(b).double().t() for a, b in pairs]
    into = [torch.ones(product.shape) for product in exact]
    found = matmul.matmul(*pairs[0], into=into[0])
    assert found is into[0]
    torch.testing.assert_close(found.double(), exact[0] + 1, rtol=1e-6, atol=1e-5)
    into[0].fill_(1.0)
    a, b = zip(*pairs, strict=True)
    found = matmul.grouped_matmul(a, b, into=into)
    for got, product in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), product + 1, rtol=1e-6, atol=1e-5)
    for got, product in zip(matmul.grouped_matmul(a, b, out=torch.bfloat16), exact, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), product, rtol=2**-8, atol=1e-3)
    assert calls == [1, 2, 2]


def test_the_rotation_is_divided_out(op: None) -> None:
    q = operand(16, 64, 1, format="mxfp4", rotation={"size": 32, "signs": "none"})
    exact = numerics.dequantize(q).double()
    (found,) = gemm.multiply([(q, q)], [torch.zeros(16, 16)], [32])
    torch.testing.assert_close(found.double(), exact @ exact.t(), rtol=1e-6, atol=1e-5)


def test_the_first_use_notices_a_wrong_sum(op: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gemm._is_exact(torch.device("cpu"))
    gemm._is_exact.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    error.append(1.0)
    with pytest.raises(KernelUnavailable, match="without FP4DIST_CUTLASS"):
        gemm._is_exact(torch.device("cpu"))


def test_what_it_does_not_take() -> None:
    a, b = operand(16, 64, 1, format="nvfp4"), operand(32, 64, 2, format="nvfp4")
    mx = operand(32, 64, 2, format="mxfp4")
    assert gemm.takes([(a, b)], [torch.zeros(16, 32)], torch.float32)
    assert gemm.takes([(a, b)], None, torch.bfloat16)
    assert not gemm.takes([(a, b)], None, torch.float32)
    assert not gemm.takes([(a, b)], [torch.zeros(16, 32, dtype=torch.bfloat16)], torch.float32)
    assert not gemm.takes([(a, b)], [torch.zeros(32, 16).t()], torch.float32)
    assert not gemm.takes([(a, b), (mx, mx)], None, torch.bfloat16)
    short = operand(16, 16, 3, format="nvfp4")  # 8 bytes a row
    assert not gemm.takes([(short, short)], None, torch.bfloat16)


def headers() -> Path | None:
    """CUTLASS's, if FP4DIST_CUTLASS names them."""
    found = runpy.run_path(str(ROOT / "csrc" / "build.py"))["cutlass_headers"]()
    return found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_scales_lie_where_cutlass_reads_them(tmp_path: Path) -> None:
    include = headers()
    if include is None:
        pytest.skip("FP4DIST_CUTLASS does not name CUTLASS's headers")
    program = tmp_path / "layouts"
    subprocess.run(
        ["nvcc", "-std=c++17", "-O0", "--expt-relaxed-constexpr", f"-I{include}", "-o", program, LAYOUTS],
        check=True, capture_output=True,
    )  # fmt: skip
    problems = [(3, 40, 64, 16), (300, 128, 96, 16), (136, 520, 4096, 32), (128, 256, 160, 32), (1, 8, 32, 16)]
    words = [str(n) for problem in problems for n in problem]
    lines = subprocess.run([program, *words], check=True, capture_output=True, text=True).stdout.splitlines()
    for (m, n, k, block), sizes, *places in zip(problems, lines[::3], lines[1::3], lines[2::3], strict=True):
        for rows, size, listed in zip((m, n), map(int, sizes.split()), places, strict=True):
            count = rows * (k // block)
            number = torch.arange(1, count + 1).view(rows, -1)
            ours = swizzle(number)
            assert size == ours.numel()
            theirs = torch.tensor([int(place) for place in listed.split()])
            assert torch.equal(ours[theirs], number.flatten())
