# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false
# Gluon's own language: its kernels' parameters have no types, and a launch takes options beside them.
"""The sums of `rescaled` for Hopper, with tensor cores that hardly wait for the multiplications between segments.

A program's tile of 128 x 256 is two halves with a sum each. While tensor cores work on one half the other is multiplied
by its ratios. Three rings of two buffers (A, and B's two halves) are filled by TMA as soon as a half has been read, for
the next tile, too, whose first segment travels while this one is written. Nothing is in flight where a step ends, and
the second sum is multiplied there by its rows' ratios: ptxas puts products in a row where it finds registers of one
read during another.

This is Gluon, Triton's language for one architecture: the interpreter does not run it. `tests/kernels/triton/rings.py`
runs it step by step with late copies and late tensor cores instead. It was never run on a GPU, and is used only after
`allow`, which is for those who measure it.
"""

from __future__ import annotations

from importlib import util

from torch import Tensor

from fp4dist.kernels.triton.gemm import Side, _can_be_described, _capability, _dense_rows, _programs

HAS_GLUON = all(util.find_spec(f"triton.{name}") is not None for name in ("experimental", "experimental.gluon"))
SEGMENT, ROWS, COLUMNS, GROUP, WARPS = 128, 128, 256, 8, 8
_allowed = False

if HAS_GLUON:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    @gluon.jit
    def place_of(tile, M, N, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr):
        """(row, column) of a tile, as `gemm._gemm_kernel` walks over them."""
        tiles_m, tiles_n = gl.cdiv(M, BM), gl.cdiv(N, BN)
        first = tile // (GROUP * tiles_n) * GROUP
        height = gl.maximum(gl.minimum(tiles_m - first, GROUP), 1)  # also behind the last tile
        return (first + tile % (GROUP * tiles_n) % height) * BM, tile % (GROUP * tiles_n) // height * BN

    @gluon.jit
    def fetch(descriptor, at, k, ring, ready, which, wanted, BYTES: gl.constexpr):
        """Start the copy of a block [128, K] at (at, k) into a ring's buffer."""
        mbarrier.expect(ready.index(which), BYTES, pred=wanted)
        tma.async_copy_global_to_shared(descriptor, [at, k], ready.index(which), ring.index(which), pred=wanted)

    @gluon.jit
    def scaled(total, of_a, of_b, ROWS_A: gl.constexpr, ROWS_B: gl.constexpr):
        """A half's sum times its factors."""
        if ROWS_A == 2:
            total = total * gl.expand_dims(of_a, 1)
        if ROWS_B == 2:
            total = total * gl.expand_dims(of_b, 0)
        return total

    @gluon.jit
    def write(
        total, factor, rows_a, rows_b, out, m, n, M, N, mma: gl.constexpr, wide: gl.constexpr,
        ROWS_A: gl.constexpr, ROWS_B: gl.constexpr, ADD: gl.constexpr,
    ):  # fmt: skip
        """Write a half [128, 128] at (m, n)."""
        r, c = m + gl.arange(0, 128, gl.SliceLayout(1, mma)), n + gl.arange(0, 128, gl.SliceLayout(0, mma))
        total = total * factor
        if ROWS_A == 1:
            total = total * gl.expand_dims(gl.load(rows_a + r, mask=r < M, other=0.0), 1)
        if ROWS_B == 1:
            total = total * gl.expand_dims(gl.load(rows_b + c, mask=c < N, other=0.0), 0)
        if out.dtype.element_ty == gl.bfloat16:
            total = gl.convert_layout(total.to(gl.bfloat16), wide)  # neighbours in memory lie in one thread
            r = m + gl.arange(0, 128, gl.SliceLayout(1, wide))
            c = n + gl.arange(0, 128, gl.SliceLayout(0, wide))
        inside = gl.expand_dims(r < M, 1) & gl.expand_dims(c < N, 0)
        at = out + gl.expand_dims(r.to(gl.int64) * N, 1) + gl.expand_dims(c, 0)
        if ADD:
            total = gl.load(at, mask=inside, other=0.0) + total
        gl.store(at, total, mask=inside)

    @gluon.jit
    def overlapped_kernel(
        a, b, out, scale_a, scale_b, inverse_rotation, ratios_a, ratios_b, stride_a, stride_b, M, N, K,
        HAS_A: gl.constexpr, HAS_B: gl.constexpr, ROWS_A: gl.constexpr, ROWS_B: gl.constexpr, ADD: gl.constexpr,
        GROUP: gl.constexpr,
    ):  # fmt: skip
        """Parameters as those of `rescaled.rescaled_kernel`; programs go over tiles. K is a multiple of 128.

        stride_a, _b   from one row of ratios to the next: M and N, filled up to whole tiles
        """
        BM: gl.constexpr = 128
        BN: gl.constexpr = 256
        BK: gl.constexpr = 128
        BYTES: gl.constexpr = 128 * 128 * 2
        mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, 128, 16])
        wide: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
        ring_a = gl.allocate_shared_memory(a.dtype, [2, 128, BK], a.layout)
        ring_0 = gl.allocate_shared_memory(b.dtype, [2, 128, BK], b.layout)
        ring_1 = gl.allocate_shared_memory(b.dtype, [2, 128, BK], b.layout)
        ready_a = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        ready_0 = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        ready_1 = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2):
            mbarrier.init(ready_a.index(i), count=1)
            mbarrier.init(ready_0.index(i), count=1)
            mbarrier.init(ready_1.index(i), count=1)
        segments = K // BK
        tiles = gl.cdiv(M, BM) * gl.cdiv(N, BN)
        mine = (tiles - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)
        factor = inverse_rotation
        if HAS_A:
            factor = factor * gl.load(scale_a)
        if HAS_B:
            factor = factor * gl.load(scale_b)
        of_rows: gl.constexpr = gl.SliceLayout(1, mma)
        of_columns: gl.constexpr = gl.SliceLayout(0, mma)
        m, n = place_of(gl.program_id(0), M, N, BM, BN, GROUP)
        next_m, next_n = place_of(gl.program_id(0) + gl.num_programs(0), M, N, BM, BN, GROUP)
        every = mine * segments
        fetch(a, m, 0, ring_a, ready_a, 0, True, BYTES)
        fetch(b, n, 0, ring_0, ready_0, 0, True, BYTES)
        fetch(b, n + 128, 0, ring_1, ready_1, 0, True, BYTES)
        second = segments > 1
        fetch(b, gl.where(second, n, next_n), gl.where(second, BK, 0), ring_0, ready_0, 1, every > 1, BYTES)
        sum_0 = gl.zeros([128, 128], gl.float32, mma)
        sum_1 = gl.zeros([128, 128], gl.float32, mma)
        step = 0  # segments of all tiles so far
        for i in range(mine):
            r = m + gl.arange(0, 128, of_rows)
            c_0 = n + gl.arange(0, 128, of_columns)
            of_a, of_1 = gl.full([128], 1.0, gl.float32, of_rows), gl.full([128], 1.0, gl.float32, of_columns)
            of_0 = of_1
            after_n = place_of(gl.program_id(0) + (i + 2) * gl.num_programs(0), M, N, BM, BN, GROUP)[1]
            for segment in range(segments):
                now, other, phase = step % 2, (step + 1) % 2, (step // 2) % 2
                # where the segment behind this one begins, of this tile or the next, and the one behind that
                last = segment + 1 == segments
                k, at_m, at_n = (
                    gl.where(last, 0, (segment + 1) * BK),
                    gl.where(last, next_m, m),
                    gl.where(last, next_n, n),
                )
                beyond = segment + 2 - segments
                far_k = gl.where(beyond < 0, segment + 2, gl.where(beyond < segments, beyond, beyond - segments)) * BK
                far_n = gl.where(beyond < 0, n, gl.where(beyond < segments, next_n, after_n))

                mbarrier.wait(ready_a.index(now), phase)
                mbarrier.wait(ready_0.index(now), phase)
                total_0 = warpgroup_mma(
                    ring_a.index(now), ring_0.index(now).permute((1, 0)), sum_0, use_acc=segment > 0, is_async=True
                )  # fmt: skip
                gl.thread_barrier()  # all warps are through with the buffers that are filled anew
                fetch(a, at_m, k, ring_a, ready_a, other, step + 1 < every, BYTES)
                fetch(b, at_n + 128, k, ring_1, ready_1, other, step + 1 < every, BYTES)
                sum_1 = scaled(sum_1, of_a, of_1, 0, ROWS_B)
                if ROWS_A == 2:
                    of_a = gl.load(ratios_a + (segment + 1) * stride_a + r)
                if ROWS_B == 2:
                    of_0 = gl.load(ratios_b + (segment + 1) * stride_b + c_0)
                mbarrier.wait(ready_1.index(now), phase)
                total_1 = warpgroup_mma(
                    ring_a.index(now), ring_1.index(now).permute((1, 0)), sum_1, use_acc=segment > 0, is_async=True
                )  # fmt: skip
                sum_0 = warpgroup_mma_wait(1, deps=[total_0])
                gl.thread_barrier()
                fetch(b, far_n, far_k, ring_0, ready_0, now, step + 2 < every, BYTES)
                sum_0 = scaled(sum_0, of_a, of_0, ROWS_A, ROWS_B)
                if ROWS_B == 2:
                    of_1 = gl.load(ratios_b + (segment + 1) * stride_b + c_0 + 128)
                sum_1 = scaled(warpgroup_mma_wait(0, deps=[total_1]), of_a, of_1, ROWS_A, 0)
                step += 1
            sum_1 = scaled(sum_1, of_a, of_1, 0, ROWS_B)
            write(sum_0, factor, ratios_a, ratios_b, out, m, n, M, N, mma, wide, ROWS_A, ROWS_B, ADD)
            write(sum_1, factor, ratios_a, ratios_b, out, m, n + 128, M, N, mma, wide, ROWS_A, ROWS_B, ADD)
            m, n = next_m, next_n
            next_m, next_n = place_of(gl.program_id(0) + (i + 2) * gl.num_programs(0), M, N, BM, BN, GROUP)


def allow() -> None:
    """Take this kernel from now on where it `takes` a product, and say that nobody has measured it."""
    global _allowed
    _allowed = True
    print("fp4dist: GEMMs of scaled segments by the Gluon kernel, which was never measured")


def takes(a: Tensor, b: Tensor) -> bool:
    """Whether `gemm` is allowed and multiplies bf16 [M, K] and [N, K] in segments of 128 columns: on Hopper alone."""
    return _allowed and HAS_GLUON and _capability(a.device)[0] == 9 and _can_be_described(a) and _can_be_described(b)


def gemm(
    a_MK: Side, b_NK: Side, ratios: tuple[Tensor | None, Tensor | None], rotation: int, result: Tensor, add: bool
) -> None:
    """Write A B^T / rotation to `result` [M, N], or add it.

    ratios   of `rescaled.ratios`, with rows filled up to a multiple of COLUMNS
    """
    a, b = _dense_rows(a_MK.values), _dense_rows(b_NK.values)
    (m, k), n = a.shape, b.shape[0]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    described = (TensorDescriptor.from_tensor(x, [ROWS, SEGMENT], layout) for x in (a, b))
    rows = [0 if side.rows is None else min(side.rows.shape[1], 2) for side in (a_MK, b_NK)]
    tiles = -(-m // ROWS) * -(-n // COLUMNS)
    overlapped_kernel[min(tiles, _programs(a.device)),](
        *described, result, a_MK.scale, b_NK.scale, 1.0 / rotation, *ratios,
        *(1 if x is None else x.shape[-1] for x in ratios), m, n, k, HAS_A=a_MK.scale is not None,
        HAS_B=b_NK.scale is not None, ROWS_A=rows[0], ROWS_B=rows[1], ADD=add, GROUP=GROUP, num_warps=WARPS,
        enable_fp_fusion=False,
    )  # fmt: skip
