# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false
# Gluon's own language: its kernels' parameters have no types, and a launch takes options beside them.
"""The sums of `rescaled` for Hopper, with tensor cores that hardly wait for the multiplications between segments.

A program's tile of 128 x 256 is two halves of 64 rows, a warpgroup's each. While tensor cores work for one of them the
other may multiply its sum by the ratios of its next segment: two multiplications an element take a quarter of the time
that tensor cores need for a segment. Tensor cores that work for both at a time are through with both at a time, and
wait; TURNS keeps the halves apart. One more warp fills a ring of buffers by TMA, as far ahead as it has room, also with
the next tile's while this one is written: bf16 leaves by TMA, through memory that another buffer would take.

This is Gluon, Triton's language for one architecture: the interpreter does not run it. `tests/kernels/triton/rings.py`
runs it with threads of Python instead, with late copies and late tensor cores. Every sum has the steps and the order of
`rescaled`. It is used only after `allow`: on an H200 it had that kernel's bits in small products, large ones were not
compared, and took 0.96 to 0.98 of its time (915 to 934 us of 950; cuBLAS without factors 706).
"""

from __future__ import annotations

from importlib import util

import torch
from torch import Tensor

from fp4dist.kernels.triton.gemm import Side, _can_be_described, _capability, _dense_rows, _programs
from fp4dist.kernels.triton.launch import integer, launch

HAS_GLUON = all(util.find_spec(f"triton.{name}") is not None for name in ("experimental", "experimental.gluon"))
SEGMENT, ROWS, COLUMNS, GROUP, WARPS = 128, 128, 256, 8, 4
STEP = 64  # columns of a buffer: half a segment
STAGES = 4
TURNS = 0  # halves take turns: 1, in each segment; 2, in the first one of a tile; 0: they do not
STAGED = True  # results in bf16 go through shared memory, in place of a buffer, and from there by TMA
_allowed = False

if HAS_GLUON:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    @gluon.jit
    def place_of(tile, M, N, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr):
        """(row, column) of a tile, as `gemm._corner` does it: Gluon calls none of tl's functions."""
        tiles_m, tiles_n = gl.cdiv(M, BM), gl.cdiv(N, BN)
        first = tile // (GROUP * tiles_n) * GROUP
        height = gl.minimum(tiles_m - first, GROUP)
        return (first + tile % (GROUP * tiles_n) % height) * BM, tile % (GROUP * tiles_n) // height * BN

    @gluon.jit
    def copy_all(
        a, b, ring_0, ring_1, ring_b, ready, free, M, N, K, STAGES: gl.constexpr, GROUP: gl.constexpr,
    ):  # fmt: skip
        """Copy A's halves and B of every step of every tile, each when its buffers are free."""
        BYTES: gl.constexpr = (128 + 256) * 64 * 2
        step = 0
        for tile in range(gl.program_id(0), gl.cdiv(M, 128) * gl.cdiv(N, 256), gl.num_programs(0)):
            m, n = place_of(tile, M, N, 128, 256, GROUP)
            for k in range(0, K, 64):
                now = step % STAGES
                mbarrier.wait(free.index(now), (step // STAGES + 1) % 2)  # at once, the first time
                mbarrier.expect(ready.index(now), BYTES)
                tma.async_copy_global_to_shared(a, [m, k], ready.index(now), ring_0.index(now))
                tma.async_copy_global_to_shared(a, [m + 64, k], ready.index(now), ring_1.index(now))
                tma.async_copy_global_to_shared(b, [n, k], ready.index(now), ring_b.index(now))
                step += 1

    @gluon.jit
    def multiply_all(
        ring_a, ring_b, ready, free, turns, room, rows_out, out, scale_a, scale_b, inverse_rotation, ratios_a, ratios_b,
        stride_a, stride_b, M, N, K, HAS_A: gl.constexpr, HAS_B: gl.constexpr, ROWS_A: gl.constexpr,
        ROWS_B: gl.constexpr, ADD: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, STAGED: gl.constexpr,
        GROUP: gl.constexpr, HALF: gl.constexpr,
    ):  # fmt: skip
        """The sums of one half of every tile, rows 64 HALF and on; if STAGED they leave through `room`."""
        mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16])
        of_rows: gl.constexpr = gl.SliceLayout(1, mma)
        of_columns: gl.constexpr = gl.SliceLayout(0, mma)
        factor = inverse_rotation
        if HAS_A:
            factor = factor * gl.load(scale_a)
        if HAS_B:
            factor = factor * gl.load(scale_b)
        step = 0
        for tile in range(gl.program_id(0), gl.cdiv(M, 128) * gl.cdiv(N, 256), gl.num_programs(0)):
            m, n = place_of(tile, M, N, 128, 256, GROUP)
            r, c = m + 64 * HALF + gl.arange(0, 64, of_rows), n + gl.arange(0, 256, of_columns)
            total = gl.zeros([64, 256], gl.float32, mma)
            for segment in range(K // 128):
                now, then = step % STAGES, (step + 1) % STAGES
                if (TURNS == 1) | ((TURNS == 2) & (segment == 0)):
                    turn = step // 2 if TURNS == 1 else tile // gl.num_programs(0)
                    mbarrier.wait(turns.index(HALF), (turn + 1 - HALF) % 2)  # the very first time at once
                mbarrier.wait(ready.index(now), step // STAGES % 2)
                first = warpgroup_mma(ring_a.index(now), ring_b.index(now).permute((1, 0)), total, is_async=True)
                if (TURNS == 1) | ((TURNS == 2) & (segment == 0)):  # half a segment left: the other half begins there
                    mbarrier.arrive(turns.index(1 - HALF), count=1)
                # what the sum is multiplied by behind this segment: on its way while tensor cores work
                if ROWS_A == 2:
                    of_a = gl.load(ratios_a + (segment + 1) * stride_a + r)
                if ROWS_B == 2:
                    of_b = gl.load(ratios_b + (segment + 1) * stride_b + c)
                mbarrier.wait(ready.index(then), (step + 1) // STAGES % 2)
                second = warpgroup_mma(ring_a.index(then), ring_b.index(then).permute((1, 0)), first, is_async=True)
                flying = warpgroup_mma_wait(1, deps=[second])
                gl.thread_barrier()  # no warp reads the first buffers any more
                mbarrier.arrive(free.index(now), count=1)
                total = warpgroup_mma_wait(0, deps=[flying])
                gl.thread_barrier()
                mbarrier.arrive(free.index(then), count=1)
                if ROWS_A == 2:
                    total = total * gl.expand_dims(of_a, 1)
                if ROWS_B == 2:
                    total = total * gl.expand_dims(of_b, 0)
                step += 2
            total = total * factor
            if ROWS_A == 1:
                total = total * gl.expand_dims(gl.load(ratios_a + r, mask=r < M, other=0.0), 1)
            if ROWS_B == 1:
                total = total * gl.expand_dims(gl.load(ratios_b + c, mask=c < N, other=0.0), 0)
            if STAGED:
                tma.store_wait(0)
                gl.thread_barrier()  # the last tile's rows have left the room
                room.store(total.to(gl.bfloat16))
                fence_async_shared()
                gl.thread_barrier()
                tma.async_copy_shared_to_global(rows_out, [m + 64 * HALF, n], room)
            else:
                inside = gl.expand_dims(r < M, 1) & gl.expand_dims(c < N, 0)
                at = out + gl.expand_dims(r.to(gl.int64) * N, 1) + gl.expand_dims(c, 0)
                if ADD:
                    total = gl.load(at, mask=inside, other=0.0) + total
                gl.store(at, total.to(out.dtype.element_ty), mask=inside)
        if STAGED:
            tma.store_wait(0)

    @gluon.jit
    def overlapped_kernel(
        a, b, rows_out, out, scale_a, scale_b, inverse_rotation, ratios_a, ratios_b, stride_a, stride_b, M, N, K,
        HAS_A: gl.constexpr, HAS_B: gl.constexpr, ROWS_A: gl.constexpr, ROWS_B: gl.constexpr, ADD: gl.constexpr,
        GROUP: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, STAGED: gl.constexpr,
    ):  # fmt: skip
        """Parameters as those of `rescaled.rescaled_kernel`; programs go over tiles. K is a multiple of 128.

        a, b           descriptors of blocks [64, 64] and [256, 64];  rows_out   STAGED: of `out`, blocks [64, 256]
        stride_a, _b   from one row of ratios to the next: M and N, filled up to whole tiles
        """
        ring_0 = gl.allocate_shared_memory(a.dtype, [STAGES, 64, 64], a.layout)
        ring_1 = gl.allocate_shared_memory(a.dtype, [STAGES, 64, 64], a.layout)
        ring_b = gl.allocate_shared_memory(b.dtype, [STAGES, 256, 64], b.layout)
        ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(ready.index(i), count=1)
            mbarrier.init(free.index(i), count=2)  # both halves read B
        rooms = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 256 if STAGED else 64], a.layout)
        for i in gl.static_range(2):
            mbarrier.init(turns.index(i), count=1)
        fence_async_shared()
        gl.warp_specialize(
            [
                (multiply_all, (
                    ring_0, ring_b, ready, free, turns, rooms.index(0), rows_out, out, scale_a, scale_b,
                    inverse_rotation, ratios_a, ratios_b, stride_a, stride_b, M, N, K, HAS_A, HAS_B, ROWS_A, ROWS_B,
                    ADD, STAGES, TURNS, STAGED, GROUP, 0,
                )),
                (multiply_all, (
                    ring_1, ring_b, ready, free, turns, rooms.index(1), rows_out, out, scale_a, scale_b,
                    inverse_rotation, ratios_a, ratios_b, stride_a, stride_b, M, N, K, HAS_A, HAS_B, ROWS_A, ROWS_B,
                    ADD, STAGES, TURNS, STAGED, GROUP, 1,
                )),
                (copy_all, (a, b, ring_0, ring_1, ring_b, ready, free, M, N, K, STAGES, GROUP)),
            ],
            [4, 1],
            [240, 24],  # registers of a thread; the first warpgroup has what is left, 240
        )  # fmt: skip


def allow(on: bool = True) -> None:
    """Take this kernel from now on where it `takes` a product, and say what was compared."""
    global _allowed
    _allowed = on
    if on:
        print("fp4dist: GEMMs of scaled segments by the Gluon kernel, whose bits were compared in small products alone")


def takes(a: Tensor, b: Tensor) -> bool:
    """Whether `gemm` is allowed and multiplies bf16 [M, K] and [N, K] in segments of 128 columns: on Hopper alone."""
    if not (_allowed and _compiles()):
        return False
    return _capability(a.device)[0] == 9 and _can_be_described(a) and _can_be_described(b)


def _compiles() -> bool:
    """Whether this Triton's Gluon is that of 3.6; 3.7 has other names."""
    return HAS_GLUON and hasattr(gl, "thread_barrier")


def fills(a: Tensor, b: Tensor) -> bool:
    """Whether a product has a tile for every multiprocessor."""
    return _tiles(a.shape[0], b.shape[0]) >= _programs(a.device)


def _tiles(m: int, n: int) -> int:
    return -(-m // ROWS) * -(-n // COLUMNS)


def gemm(
    a_MK: Side, b_NK: Side, ratios: tuple[Tensor | None, Tensor | None], rotation: int, result: Tensor, add: bool
) -> None:
    """Write A B^T / rotation to `result` [M, N], or add it.

    ratios   of `rescaled.ratios`, with rows filled up to a multiple of COLUMNS
    """
    a, b = _dense_rows(a_MK.values), _dense_rows(b_NK.values)
    (m, k), n = a.shape, b.shape[0]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    described = [TensorDescriptor.from_tensor(x, [r, STEP], layout) for x, r in ((a, ROWS // 2), (b, COLUMNS))]
    staged = STAGED and result.dtype == torch.bfloat16 and not add and _can_be_described(result)
    described.append(TensorDescriptor.from_tensor(result, [ROWS // 2, COLUMNS], layout) if staged else described[0])
    rows = [0 if side.rows is None else min(side.rows.shape[1], 2) for side in (a_MK, b_NK)]
    scales, strides = (a_MK.scale, b_NK.scale), (1 if x is None else x.shape[-1] for x in ratios)
    sizes = *strides, m, n, k
    constants = {
        "HAS_A": scales[0] is not None, "HAS_B": scales[1] is not None, "ROWS_A": rows[0], "ROWS_B": rows[1],
        "ADD": add, "GROUP": GROUP, "STAGES": STAGES - staged, "TURNS": TURNS, "STAGED": staged,
        "num_warps": WARPS, "enable_fp_fusion": False,
    }  # fmt: skip
    form = (
        "overlapped", a.device, result.dtype, *map(integer, sizes),
        *(x.data_ptr() % 16 for x in (result, *scales, *ratios) if x is not None), *constants.values(),
    )  # fmt: skip
    arguments = *described, result, *scales, 1.0 / rotation, *ratios, *sizes
    launch(overlapped_kernel, min(_tiles(m, n), _programs(a.device)), arguments, constants, form)
