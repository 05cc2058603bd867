// The quantizer of one tile: read, rotate, scale, round, store. Instances are in the quantize_*.cu files.
//
// Rows are read from global memory as they lie: a thread has L elements of a row, its neighbours the next ones. A
// transpose that direct.cuh does not take goes through shared memory, 128 elements of the contracted dimension by
// kColumns of the other; there a thread has L elements of a column.
#pragma once

#include "direct.cuh"
#include "quantize_families.h"

namespace fp4dist {

// Strips of L elements, in rows: BR > 1 puts the rows of a block side by side, so that lanes exchange over them.
template <class S, bool WIDE>
__global__ void __launch_bounds__(kThreads, S::kResident) rows_kernel(const __grid_constant__ Job job) {
  if (needless<S>(job)) return;
  constexpr int L = S::L, BR = S::BR;
  constexpr uint32_t kEach = kThreads / BR;
  const uint32_t strips = static_cast<uint32_t>(job.cols) / L;
  const uint32_t number = static_cast<uint32_t>(job.rows) / BR * strips;  // of groups of BR strips
  const uint32_t stride = kEach * gridDim.x;
  uint32_t found = blockIdx.x * kEach + threadIdx.x / BR;
  // the next elements are on their way while these are worked on, where registers allow it
  constexpr bool kAhead = !WIDE && (S::ROT == 1 || !S::NOISY);
  Row<L, WIDE> next;
  // where the next strip is, by additions alone: a division a strip is more work than rounding an element
  const uint32_t row_step = stride / strips, strip_step = stride % strips;
  uint32_t row = found / strips, strip = found % strips;
  const auto step = [&] {
    found += stride;
    row += row_step;
    strip += strip_step;
    if (strip >= strips) strip -= strips, ++row;
  };
  const auto spot = [&] {  // of a thread without a strip: the first one, which is there
    const bool inside = found < number;
    return Spot{static_cast<int>((inside ? row : 0) * BR + threadIdx.x % BR),
                static_cast<int>((inside ? strip : 0) * L), inside};
  };
  Spot at = spot();
  if (kAhead) next.read(job.data, at.row * job.stride + at.col);
  const Whole whole = whole_of<S>(job);
  const uint32_t* masks = WIDE ? nullptr : masks_of<S::ROT, true>(job.signs);
  if (masks) __syncthreads();
  uint32_t top = 0;
  // all threads of a block make the same number of rounds: lanes exchange
  for (uint32_t round = blockIdx.x * kEach; round < number; round += stride) {
    float y[L];
    if (!kAhead) next.read(job.data, at.row * job.stride + at.col);
    const Spot now = at;
    if constexpr (!WIDE) {
      if (masks) flip_pairs<S::ROT>(masks, now.col, next.vectors);
    }
    next.get(y);
    if (WIDE && job.signs.mode != 0) flip(y, whole.signs >> (now.col % 32));
    step();
    at = spot();
    if (kAhead && round + stride < number) next.read(job.data, at.row * job.stride + at.col);
    const uint32_t magnitude = quantize_row<S>(job, whole, y, now.row, now.col, now.inside);
    top = magnitude > top ? magnitude : top;
  }
  raise(job, top, whole.largest);
}

// Two strips of L elements for each thread. Neighbouring lanes exchange: along the contracted dimension where a
// rotation is longer than L, over the rows of a block of several. masks: of columns, or null.
template <class S, bool WIDE>
__device__ __forceinline__ void transposed_tile(const Job& job, const Whole& whole, const uint32_t* masks,
                                                const uint4* tile, int col, int row) {
  constexpr int L = S::L;
  static_assert(S::kStrips * S::kColumns == 2 * kThreads, "two strips a thread");
  if constexpr (!WIDE && S::BR == 1) {
    const int at = static_cast<int>(threadIdx.x) % S::kStrips * L;
    const int column = static_cast<int>(threadIdx.x) / S::kStrips * 2;
    uint32_t words[L];
    tile_columns<L, S::kColumns>(tile, at, column, words);
    if (masks) flip_columns<S::ROT>(masks, col + at, words);
    raise(job, quantize_columns<S, 1>(job, whole, words, row + column, col + at), whole.largest);
  } else {
    uint32_t top = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * kThreads; i += kThreads) {
      const int strip = S::BR == 1 ? i % S::kStrips : i / S::kColumns;
      const int column = S::BR == 1 ? i / S::kStrips : i % S::kColumns;
      const int r = row + column, c = col + strip * L;
      float y[L];
      tile_column<L, S::kColumns, WIDE>(tile, strip * L, column, y);
      if (!WIDE && job.source >= kCodesE4M3) {
#pragma unroll
        for (int j = 0; j < L; ++j) y[j] = y[j] * whole.post;
      }
      if (WIDE && job.back > 1) {  // the signs of the rotation are there, those that codes are turned back from are not
        const float sign = job.back_signs >> (r % 32) & 1u ? -1.0f : 1.0f;
#pragma unroll
        for (int j = 0; j < L; ++j) y[j] = y[j] * sign;
      } else if (WIDE && job.signs.mode != 0) {
        flip(y, whole.signs >> (c % 32));
      }
      const uint32_t found = quantize_row<S>(job, whole, y, r, c, r < job.rows && c < job.cols);
      top = found > top ? found : top;
    }
    raise(job, top, whole.largest);
  }
}

// Tiles of the transpose: memory is [job.cols, job.rows].
template <class S, bool WIDE>
__global__ void __launch_bounds__(kThreads, WIDE && S::kResidentTurned > 3 ? 3 : S::kResidentTurned)
    columns_kernel(const __grid_constant__ Job job) {
  if (needless<S>(job)) return;
  FP4DIST_DYNAMIC_SHARED(memory);
  auto* tile = reinterpret_cast<uint4*>(memory);
  const int across = (job.rows + S::kColumns - 1) / S::kColumns;
  const int col = blockIdx.x / across * kDepth, row = blockIdx.x % across * S::kColumns;
  const uint32_t* masks = masks_of<S::ROT, false>(job.signs);
  if constexpr (WIDE) {
    if (job.back > 1) __syncthreads();
  }
  fill_tile<S::kColumns, WIDE>(job, tile, col, row, masks, kSigns<S::ROT>);
  const Whole whole = whole_of<S>(job);
  wait_for_copies();
  __syncthreads();
  transposed_tile<S, WIDE>(job, whole, masks, tile, col, row);
}

// Resident blocks that a pair's kernel leaves registers for: at most three, and no more than either alone.
template <class A, class B>
constexpr int pair_resident = A::kResident <= 2 || B::kResidentTurned <= 2 || (A::L == 32 && A::ROT > 1) ? 2 : 3;

// Both from one reading of a bf16 tile of memory [a.rows, a.cols]: its rows under A, its columns under B.
template <class A, class B>
__global__ void __launch_bounds__(kThreads, pair_resident<A, B>)
    pair_kernel(const __grid_constant__ Job a, const __grid_constant__ Job b) {
  static_assert(A::BR == 1 && B::BR == 1 && B::kColumns % A::ROT == 0, "whole rotations in a tile");
  FP4DIST_DYNAMIC_SHARED(memory);
  constexpr int L = A::L, kStrips = B::kColumns / L;
  auto* tile = reinterpret_cast<uint4*>(memory);
  const int across = (a.cols + B::kColumns - 1) / B::kColumns;
  const int row = blockIdx.x / across * kDepth, col = blockIdx.x % across * B::kColumns;
  const uint32_t *of_pairs = masks_of<A::ROT, true>(a.signs), *of_columns = masks_of<B::ROT, false>(b.signs);
  fill_tile<B::kColumns, false>(b, tile, row, col);
  const Whole of_a = whole_of<A>(a);
  wait_for_copies();
  __syncthreads();
  uint32_t top = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < kDepth * kStrips; i += kThreads) {
    const int r = row + i / kStrips, c = col + i % kStrips * L;
    float y[L];
    uint4 vectors[L / 8];
    tile_row<L, B::kColumns>(tile, i / kStrips, i % kStrips, vectors);
    if (of_pairs) flip_pairs<A::ROT>(of_pairs, c, vectors);
#pragma unroll
    for (int j = 0; j < L / 8; ++j) unpack<false>(vectors[j], &y[8 * j]);
    const uint32_t found = quantize_row<A>(a, of_a, y, r, c, r < a.rows && c < a.cols);
    top = found > top ? found : top;
  }
  raise(a, top, of_a.largest);
  transposed_tile<B, false>(b, whole_of<B>(b), of_columns, tile, row, col);
}

// ---- launches -------------------------------------------------------------------------------------------------------

// The rule that a job's kernel is compiled for.
inline Rule compiled_rule(const Job& job) {
  if (job.rule == kCeil || job.rule == kCeilAmax) return kFloor;
  if (job.rule == kQuestNearest) return kQuestFloor;
  return static_cast<Rule>(job.rule);
}

template <class S>
bool is(const Job& job) {
  return compiled_rule(job) == S::RULE && job.block_cols == S::E && job.block_rows == S::BR && job.rotation == S::ROT &&
         (job.noisy != 0) == S::NOISY;
}

inline int64_t tiles(const Job& job, int columns) {
  return static_cast<int64_t>((job.cols + kDepth - 1) / kDepth) * ((job.rows + columns - 1) / columns);
}

template <class Kernel>
cudaError_t allow_shared(Kernel kernel, int bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

template <class S, bool WIDE>
cudaError_t launch(const Job& job, cudaStream_t stream) {
  if constexpr (!WIDE && S::BR == 1 && S::L == 16 && S::NOISY) {
    if (is_held(job)) {
      const auto kernel = &held_kernel<S>;
      FP4DIST_LAUNCH(kernel, static_cast<unsigned>(tiles(job, kHeldColumns)), kThreads, 0, stream, job);
      return cudaGetLastError();
    }
  }
  if constexpr (!WIDE && S::BR == 1) {
    if (is_direct(job)) {
      const auto kernel = &direct_kernel<S>;
      FP4DIST_LAUNCH(kernel, static_cast<unsigned>(tiles(job, S::kColumns)), kThreads, 0, stream, job);
      return cudaGetLastError();
    }
  }
  if (job.turned) {
    const int bytes = kDepth * S::kColumns * (WIDE ? 4 : 2);
    const auto kernel = &columns_kernel<S, WIDE>;
    if (const cudaError_t error = allow_shared(kernel, bytes)) return error;
    FP4DIST_LAUNCH(kernel, static_cast<unsigned>(tiles(job, S::kColumns)), kThreads, bytes, stream, job);
  } else {
    const int64_t strips = static_cast<int64_t>(job.rows) * (job.cols / S::L);
    const int64_t blocks = (strips + kThreads - 1) / kThreads, most = S::RULE == kMeasure ? 1024 : 4096;
    const auto kernel = &rows_kernel<S, WIDE>;
    FP4DIST_LAUNCH(kernel, static_cast<unsigned>(blocks < most ? blocks : most), kThreads, 0, stream, job);
  }
  return cudaGetLastError();
}

template <class A, class B>
cudaError_t launch_pair(const Job& a, const Job& b, cudaStream_t stream) {
  const auto kernel = &pair_kernel<A, B>;
  const int bytes = kDepth * B::kColumns * 2;
  FP4DIST_LAUNCH(kernel, static_cast<unsigned>(tiles(b, B::kColumns)), kThreads, bytes, stream, a, b);
  return cudaGetLastError();
}

template <class A, class B>
LaunchPair pair_of(const Job& a, const Job& b) {
  return is<A>(a) && is<B>(b) ? &launch_pair<A, B> : nullptr;
}

template <class... S>
Launch first_of(const Job& job) {
  Launch found = nullptr;
  ((found = found == nullptr && is<S>(job) ? (is_wide(job) ? &launch<S, true> : &launch<S, false>) : found), ...);
  return found;
}

}  // namespace fp4dist
