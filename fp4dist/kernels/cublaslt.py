"""GEMMs of cuBLASLt with the factor of the result on the device, and with the sum taken up inside the GEMM.

    D = alpha A B^T + beta D        alpha: fp32 numbers in device memory; beta: 1 where a sum goes on, else 0

and, for FP8 operands, with a factor of each row of A and of B.

torch offers neither (`addmm(alpha=)` is a host scalar, `scaled_mm` does not accumulate), so the library that torch has
already loaded is called through its C interface: no compiler, nothing to build. The algorithm is the heuristic's first
one for the problem, or one of its next that `_preferred_tile` names; none is chosen by timing, and sums are reduced in
fp32 alone: bits depend on nothing but shapes, types, alignment, the device and the library's version.

Constants and structures: NVIDIA cuBLAS 12 and 13, `cublasLt.h`, `cublas_api.h`, `library_types.h`.
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp4dist.errors import KernelUnavailable

WORKSPACE = 32 * 2**20  # bytes that an algorithm may ask for
ALIGNMENT = 256  # bytes: the strictest that the heuristic asks about
CANDIDATES = 8  # algorithms that the heuristic is asked for

_TYPES = {torch.float32: 0, torch.bfloat16: 14, torch.float8_e4m3fn: 28, torch.float8_e5m2: 29}  # cudaDataType
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_COMPUTE_32F = 68
_NOT_TRANSPOSED, _TRANSPOSED = 0, 1
_POINTERS_ON_DEVICE = 1
_DESC_POINTER_MODE, _DESC_TRANSA, _DESC_TRANSB, _DESC_FAST_ACCUM = 2, 3, 4, 25
_DESC_SCALES, _DESC_SCALE_MODES = (17, 18), (31, 32)  # of cuBLASLt's first and second operand
_SCALE_OF_ROWS = 3  # CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F, since 12.9
_PREF_WORKSPACE, _PREF_REDUCTION, _PREF_ALIGNMENT = 1, 3, (5, 6, 7, 8)
_REDUCE_IN_FP32 = 2  # CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE; those in place or in the output's type would round twice
_STATUS = {
    1: "not initialized", 3: "allocation failed", 7: "invalid value", 8: "architecture mismatch", 11: "mapping error",
    13: "execution failed", 14: "internal error", 15: "not supported", 16: "license error",
}  # fmt: skip
_INVALID, _NOT_SUPPORTED = 7, 15
_ALGORITHM_TILE = 1  # CUBLASLT_ALGO_CONFIG_TILE_ID
_TILE_128x160, _TILE_201 = 29, 201  # the second by its number: the headers' later tiles


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class Problem(NamedTuple):
    """What an algorithm is chosen for. A is [M, K], B [N, K], D [M, N] row by row.

    ld_a, ld_b     elements from one row to the next, or from one column to the next where `turned`
    turned_a, _b   whether the operand lies column by column
    alignment      bytes that the addresses of A, B and D are multiples of, at most ALIGNMENT
    rows           whether rows of A and B have factors
    """

    device: int
    m: int
    n: int
    k: int
    type_a: torch.dtype
    type_b: torch.dtype
    type_d: torch.dtype
    ld_a: int
    ld_b: int
    ld_d: int
    turned_a: bool
    turned_b: bool
    alignment: int
    rows: bool


class _Plan(NamedTuple):
    """Descriptors and the chosen algorithm, as addresses; they live as long as their thread.

    scales   of the second operand and of the first: where their address is written, and how it then is given
    """

    handle: int
    operation: int
    first: int
    second: int
    result: int
    heuristic: _Heuristic
    algorithm: int
    workspace: int  # bytes
    beta: tuple[int, int]  # addresses of 0 and 1
    scales: tuple[tuple[ctypes.c_void_p, tuple[Any, ...]], ...] = ()


class _Local(threading.local):
    """What a thread has: descriptors are written to before each call, so threads do not share them."""

    def __init__(self) -> None:
        self.handles: dict[int, ctypes.c_void_p] = {}
        self.plans: dict[tuple[Any, ...], _Plan | None] = {}


_local = _Local()


def why_not(device: torch.device) -> str | None:
    """Why the library cannot be used on `device`, or None."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"cuBLASLt needs an NVIDIA GPU, the tensor is on {device.type}"
    return None if _library() is not None else "libcublasLt, which comes with torch, was not found"


def matmul(
    a_MK: Tensor,
    b_NK: Tensor,
    scale_a: Tensor | None = None,
    scale_b: Tensor | None = None,
    rotation: int = 1,
    *,
    rows_a: Tensor | None = None,
    rows_b: Tensor | None = None,
    out: torch.dtype = torch.float32,
    into: Tensor | None = None,
    room: Tensor | None = None,
) -> Tensor | None:
    """A B^T / rotation in `out`, or added to `into`; None where cuBLASLt has no algorithm for the operands.

    a_MK, b_NK        [M, K], [N, K], rows or columns without gaps: both bf16, or FP8 (e4m3 x e4m3, e4m3 x e5m2)
    scale_a, scale_b  [] fp32 on the same device, factors of A and of B, read when the GEMM runs; None: 1
    rows_a, rows_b    [M, 1], [N, 1] fp32, dense: factors of rows, of FP8 operands only
    into              [M, N] fp32, rows without gaps
    room              [M, N] in `out`, dense and ALIGNMENT bytes aligned, as new memory is: where the result goes

    Runs on the current stream, synchronizes nothing, and can be captured in a CUDA graph.
    """
    device: int = a_MK.device.index
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return matmul(
                a_MK, b_NK, scale_a, scale_b, rotation, rows_a=rows_a, rows_b=rows_b, out=out, into=into, room=room
            )  # fmt: skip
    rows = rows_a is not None or rows_b is not None
    a, b, d = a_MK.data_ptr(), b_NK.data_ptr(), 0 if into is None else into.data_ptr()
    alignment = _alignment(a | b | d)
    key = (
        device, a_MK.shape, a_MK.stride(), a_MK.dtype, b_NK.shape, b_NK.stride(), b_NK.dtype, out,
        None if into is None else into.stride(), rows, alignment,
    )  # fmt: skip
    try:
        plan = _local.plans[key]
    except KeyError:
        problem = _problem(a_MK, b_NK, out, into, rows)
        plan = _local.plans[key] = None if problem is None else _plan(problem)
    if plan is None:
        return None
    result = into if into is not None else room
    if result is None:
        result = torch.empty((a_MK.shape[0], b_NK.shape[0]), dtype=out, device=a_MK.device)
    held = _set_factors(plan, a_MK, b_NK, scale_a, scale_b, rotation, rows, rows_a, rows_b)
    workspace = torch.empty(plan.workspace, dtype=torch.uint8, device=a_MK.device) if plan.workspace else None
    address = result.data_ptr()
    # rows of D are columns to cuBLASLt: it computes D^T = B A^T
    status = _lib().cublasLtMatmul(
        plan.handle, plan.operation, held[0].data_ptr(), b, plan.first, a, plan.second, plan.beta[into is not None],
        address, plan.result, address, plan.result, plan.algorithm, None if workspace is None else workspace.data_ptr(),
        plan.workspace, torch._C._cuda_getCurrentRawStream(device),
    )  # fmt: skip
    if status:
        _check(status, "cublasLtMatmul", key)
    return result


def _set_factors(
    plan: _Plan, a: Tensor, b: Tensor, scale_a: Tensor | None, scale_b: Tensor | None, rotation: int, rows: bool,
    rows_a: Tensor | None, rows_b: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Give the operation its factors. Returns tensors to hold until the launch, alpha first: memory that is freed
    before would be given out again, perhaps as the result's.
    """
    one = constant(a.device.index, 1.0)
    if not rows and a.dtype in _FP8:  # the tensor cores' type has scales of its own
        scale_a, scale_b = one if scale_a is None else scale_a, one if scale_b is None else scale_b
        _point(plan, scale_b, scale_a)
        return constant(a.device.index, 1.0 / rotation), scale_a, scale_b
    alpha = _alpha(one, scale_a, scale_b, rotation)
    if not rows:
        return (alpha,)
    rows_a = torch.ones(a.shape[0], device=a.device) if rows_a is None else rows_a
    rows_b = torch.ones(b.shape[0], device=a.device) if rows_b is None else rows_b
    _point(plan, rows_b, rows_a)
    return alpha, rows_a, rows_b


def _point(plan: _Plan, first: Tensor, second: Tensor) -> None:
    setter = _lib().cublasLtMatmulDescSetAttribute
    for (address, given), factors in zip(plan.scales, (first, second), strict=True):
        address.value = factors.data_ptr()
        status = setter(*given)
        if status:
            raise RuntimeError(f"cuBLASLt: setting the pointer to a scale returned {status} ({_STATUS.get(status)})")


def _scales_of(operation: ctypes.c_void_p) -> tuple[tuple[ctypes.c_void_p, tuple[Any, ...]], ...]:
    """For `_Plan`: arguments of cublasLtMatmulDescSetAttribute, which reads the address when it is called."""
    addresses = [ctypes.c_void_p() for _ in _DESC_SCALES]
    size = ctypes.c_size_t(ctypes.sizeof(ctypes.c_void_p))
    return tuple(
        (address, (operation, where, ctypes.byref(address), size))
        for where, address in zip(_DESC_SCALES, addresses, strict=True)
    )


def _alpha(one: Tensor, scale_a: Tensor | None, scale_b: Tensor | None, rotation: int) -> Tensor:
    """[] fp32 scale of A * scale of B / rotation, in one kernel at most."""
    if rotation == 1 and (scale_a is None or scale_b is None):
        given = scale_b if scale_a is None else scale_a
        return one if given is None else given
    left, right = one if scale_a is None else scale_a, one if scale_b is None else scale_b
    if rotation == 1:
        return torch.mul(left, right)
    return torch.addcmul(constant(one.device.index, 0.0), left, right, value=1.0 / rotation)


@cache
def constant(device: int, value: float) -> Tensor:
    """[] fp32 `value` on a CUDA device, made once, by a copy that is complete when this returns."""
    return torch.tensor(value, device=f"cuda:{device}")


def _problem(a: Tensor, b: Tensor, out: torch.dtype, into: Tensor | None, rows: bool = False) -> Problem | None:
    """None for what cuBLASLt does not take at all."""
    (m, k), n = a.shape, b.shape[0]
    layouts = _layout(a), _layout(b)
    if None in layouts or min(m, n, k) == 0 or (into is not None and _layout(into) != (False, n)):
        return None
    (turned_a, ld_a), (turned_b, ld_b) = layouts  # type: ignore[misc]
    fp8 = a.dtype in _FP8 and b.dtype in _FP8 and torch.float8_e4m3fn in (a.dtype, b.dtype)
    ragged = bool((n | k | ld_a | ld_b) % 16)  # its FP8 kernels take any M
    if not (fp8 and not (turned_a or turned_b or ragged)) and not a.dtype == b.dtype == torch.bfloat16:
        return None
    # a fresh tensor of torch's is aligned to 512
    alignment = _alignment(a.data_ptr() | b.data_ptr() | (0 if into is None else into.data_ptr()))
    if (fp8 and alignment < 16) or (rows and not fp8):
        return None
    return Problem(
        a.device.index, m, n, k, a.dtype, b.dtype, out if into is None else torch.float32, ld_a, ld_b, n, turned_a,
        turned_b, alignment, rows,
    )  # fmt: skip


def _layout(x: Tensor) -> tuple[bool, int] | None:
    """(lies column by column, elements between its rows or columns); None: neither rows nor columns are dense."""
    rows, columns = x.shape
    down, along = x.stride()
    if (along == 1 or columns == 1) and (down >= columns or rows == 1):
        return False, down if rows > 1 else columns
    if (down == 1 or rows == 1) and (along >= rows or columns == 1):
        return True, along if columns > 1 else rows
    return None


def _alignment(addresses: int) -> int:
    """Of addresses, combined by or."""
    return min(addresses & -addresses, ALIGNMENT) if addresses else ALIGNMENT


def _address(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _plan(problem: Problem) -> _Plan | None:
    """Descriptors of D^T [N, M] = B A^T, column by column, and the heuristic's first algorithm."""
    p, lib = problem, _lib()
    operation = ctypes.c_void_p()
    _check(lib.cublasLtMatmulDescCreate(ctypes.byref(operation), _COMPUTE_32F, _TYPES[torch.float32]), "desc", p)
    settings = [
        (_DESC_POINTER_MODE, _POINTERS_ON_DEVICE),
        (_DESC_TRANSA, _NOT_TRANSPOSED if p.turned_b else _TRANSPOSED),
        (_DESC_TRANSB, _TRANSPOSED if p.turned_a else _NOT_TRANSPOSED),
    ]
    for name, value in settings:
        _set(lib.cublasLtMatmulDescSetAttribute, operation, name, ctypes.c_int32(value), p)
    if p.type_a in _FP8:
        _set(lib.cublasLtMatmulDescSetAttribute, operation, _DESC_FAST_ACCUM, ctypes.c_int8(0), p)
    if p.rows:
        for name in _DESC_SCALE_MODES:
            if not _takes(lib.cublasLtMatmulDescSetAttribute, operation, name, ctypes.c_int32(_SCALE_OF_ROWS)):
                return None  # a library before 12.9
        for name in _DESC_SCALES:  # the heuristic refuses this mode without a pointer; each call sets its own
            _set(lib.cublasLtMatmulDescSetAttribute, operation, name, _address(constant(p.device, 1.0)), p)
    first = _matrix(p.type_b, *((p.n, p.k) if p.turned_b else (p.k, p.n)), p.ld_b, p)
    second = _matrix(p.type_a, *((p.m, p.k) if p.turned_a else (p.k, p.m)), p.ld_a, p)
    result = _matrix(p.type_d, p.n, p.m, p.ld_d, p)
    heuristic = _choose(operation, first, second, result, p)
    if heuristic is None:
        return None
    handle, beta = _handle(p.device), (constant(p.device, 0.0).data_ptr(), constant(p.device, 1.0).data_ptr())
    return _Plan(
        handle.value or 0, operation.value or 0, first.value or 0, second.value or 0, result.value or 0, heuristic,
        ctypes.addressof(heuristic.algorithm), heuristic.workspace, beta, _scales_of(operation),
    )  # fmt: skip


def _matrix(dtype: torch.dtype, rows: int, columns: int, ld: int, problem: Problem) -> ctypes.c_void_p:
    layout = ctypes.c_void_p()
    status = _lib().cublasLtMatrixLayoutCreate(
        ctypes.byref(layout), _TYPES[dtype], ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(ld)
    )
    _check(status, "cublasLtMatrixLayoutCreate", problem)
    return layout


def _choose(
    operation: ctypes.c_void_p,
    first: ctypes.c_void_p,
    second: ctypes.c_void_p,
    result: ctypes.c_void_p,
    problem: Problem,
) -> _Heuristic | None:
    """The first algorithm of the heuristic, or the first with the preferred tile; None where there is none."""
    lib, preference, found = _lib(), ctypes.c_void_p(), ctypes.c_int(0)
    _check(lib.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)), "cublasLtMatmulPreferenceCreate", problem)
    settings: list[tuple[int, Any]] = [
        (_PREF_WORKSPACE, ctypes.c_uint64(WORKSPACE)),
        (_PREF_REDUCTION, ctypes.c_uint32(_REDUCE_IN_FP32)),
        *((name, ctypes.c_uint32(problem.alignment)) for name in _PREF_ALIGNMENT),
    ]
    candidates = (_Heuristic * CANDIDATES)()
    try:
        for name, value in settings:
            _set(lib.cublasLtMatmulPreferenceSetAttribute, preference, name, value, problem)
        status = lib.cublasLtMatmulAlgoGetHeuristic(
            _handle(problem.device), operation, first, second, result, result, preference, CANDIDATES, candidates,
            ctypes.byref(found),
        )  # fmt: skip
    finally:
        lib.cublasLtMatmulPreferenceDestroy(preference)
    if status == _NOT_SUPPORTED or (status == _INVALID and problem.rows):  # how libraries without that mode say no
        return None
    _check(status, "cublasLtMatmulAlgoGetHeuristic", problem)
    usable = [candidate for candidate in candidates[: found.value] if candidate.state == 0]
    wanted = _preferred_tile(problem)
    return next((c for c in usable if wanted is not None and _tile(c) == wanted), usable[0] if usable else None)


def _preferred_tile(problem: Problem) -> int | None:
    """The CUBLASLT_MATMUL_TILE that ran fastest where it was not the heuristic's first choice; None: take that.

    Large bf16 products on an H100 with CUDA 13.0: 0.639 instead of 0.666 ms for 16384 x 4096 x 4096, 0.632 instead of
    0.687 ms for 16384 x 8192 x 2048. With K of 8192 and more the first choice was the fastest.
    """
    if problem.type_a != torch.bfloat16 or problem.m * problem.n < 2**25 or problem.k > 4096:
        return None
    return _TILE_128x160 if problem.k > 2048 else _TILE_201


def _tile(candidate: _Heuristic) -> int:
    tile, written = ctypes.c_uint32(0), ctypes.c_size_t(0)
    _lib().cublasLtMatmulAlgoConfigGetAttribute(
        ctypes.byref(candidate.algorithm),
        _ALGORITHM_TILE,
        ctypes.byref(tile),
        ctypes.c_size_t(4),
        ctypes.byref(written),
    )
    return tile.value


def _set(setter: Any, what: ctypes.c_void_p, name: int, value: Any, problem: Problem) -> None:
    _check(_status(setter, what, name, value), f"setting attribute {name}", problem)


def _takes(setter: Any, what: ctypes.c_void_p, name: int, value: Any) -> bool:
    """Whether the library knows the attribute and the value."""
    return _status(setter, what, name, value) == 0


def _status(setter: Any, what: ctypes.c_void_p, name: int, value: Any) -> int:
    return setter(what, name, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value)))


def _check(status: int, call: str, problem: Problem | tuple[Any, ...]) -> None:
    if status:
        reason = _STATUS.get(status, "unknown")
        raise RuntimeError(f"cuBLASLt: {call} returned {status} ({reason}) for {problem}")


def _handle(device: int) -> ctypes.c_void_p:
    """This thread's handle for the current device, which is `device`."""
    if device not in _local.handles:
        handle = ctypes.c_void_p()
        status = _lib().cublasLtCreate(ctypes.byref(handle))
        if status:
            raise RuntimeError(f"cuBLASLt: cublasLtCreate on cuda:{device} returned {status} ({_STATUS.get(status)})")
        _local.handles[device] = handle
    return _local.handles[device]


def _lib() -> Any:
    found = _library()
    if found is None:
        raise KernelUnavailable("libcublasLt, which comes with torch, was not found")
    return found


@cache
def _library() -> ctypes.CDLL | None:
    """The library that this process has loaded with torch, else the one on the loader's path."""
    if torch.version.cuda is None:
        return None
    for name in (*_loaded(), f"libcublasLt.so.{torch.version.cuda.partition('.')[0]}"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        address = ctypes.c_void_p
        library.cublasLtMatmul.argtypes = [*(address,) * 14, ctypes.c_size_t, address]
        return library
    return None


def _loaded() -> list[str]:
    """Paths of libcublasLt among this process's mapped files."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text(encoding="utf-8").splitlines() if maps.is_file() else []
    paths = [line[line.index("/") :] for line in lines if "libcublasLt.so" in line]
    return list(dict.fromkeys(paths))
