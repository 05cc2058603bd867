// The quantizer of one tile: read, rotate, scale, round, store. Instances are in the quantize_*.cu files.
//
// Rows are read from global memory as they lie: a thread has L elements of a row, its neighbours the next ones. The
// transpose goes through shared memory, 128 elements of the contracted dimension by kColumns of the other; there a
// thread has L elements of a column.
#pragma once

#include "quantize_families.h"
#include "round.cuh"

namespace fp4dist {

// Quantizes the L elements y of a row at (row, col); `inside` is false for a thread without an element of its own,
// which takes part in exchanges only. Gives magnitude bits for `top`.
template <class S>
__device__ __forceinline__ uint32_t quantize_row(const Job& job, const Whole& whole, float (&y)[S::L], int row, int col,
                                                 bool inside) {
  constexpr int E = S::E, L = S::L;
  if constexpr (S::ROT > 1) {
    if (job.signs.mode != 0) flip(y, whole.signs >> (col % 32));
    butterflies<S::ROT>(y);
  }
  if constexpr (S::RULE == kFloor) {
    static_assert(S::W == L, "a block, or half of one, for each thread");
    if (values_alone(job)) {
      const Spot spot{row, col, inside};
      const uint32_t byte = job.narrow == kToE5M2 ? quantize_values<2, S>(job, whole, spot, y)
                                                  : quantize_values<3, S>(job, whole, spot, y);
      return inside && byte != 255u ? byte : 0u;
    }
  }
  if constexpr (S::RULE == kMeasure) return inside ? bits(largest<L>(y)) : 0u;
  uint32_t words[L / 8];
  uint32_t top = 0;
#pragma unroll
  for (int b = 0; b < L / S::W; ++b) {
    const int at = col + b * S::W;
    if constexpr (S::RULE == kEden) {
      const float corrected = choose_eden<S>(job, y + b * E, words + b * (E / 8));
      const uint32_t magnitude = bits(corrected) & 0x7fffffffu;
      top = magnitude > top ? magnitude : top;
      if (inside) static_cast<float*>(job.scales)[static_cast<int64_t>(row) * (job.cols / E) + at / E] = corrected;
    } else {
      const uint32_t byte = quantize_block<S>(job, whole, {row, at, inside}, y + b * S::W, words + b * (S::W / 8));
      if (inside && job.scales && at % E == 0) store_scale<S>(job, row, at, byte);
      if (!S::kTensorScale && byte != 255u) top = byte > top ? byte : top;
    }
  }
  if (inside && job.codes) store_codes<L / 8>(job.codes + element_at(job, row, col) / 8, words);
  return inside ? top : 0u;
}

// The largest `top` of the block's threads goes to job.top; largest: of `Whole`.
__device__ __forceinline__ void raise(const Job& job, uint32_t top, int largest) {
  __shared__ uint32_t tops[kThreads / 32];
  if (!job.top) return;
  top = __reduce_max_sync(kWarp, top);
  __syncthreads();  // a pair comes here twice
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  top = __reduce_max_sync(kWarp, threadIdx.x < kThreads / 32 ? tops[threadIdx.x] : 0u);
  if (threadIdx.x != 0 || top == 0) return;
  atomicMax(job.top, top);
  if (job.narrow && static_cast<int>(top) > largest) job.memory[kMisfits] = 1;
}

// Whether codes are asked for only because values alone did not fit, and they did.
template <class S>
__device__ __forceinline__ bool needless(const Job& job) {
  if constexpr (S::RULE == kFloor) return job.narrow == kMisfitsAlone && job.memory[kMisfits] == 0;
  return false;
}

// ---- kernels --------------------------------------------------------------------------------------------------------

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
  uint32_t top = 0;
  // all threads of a block make the same number of rounds: lanes exchange
  for (uint32_t round = blockIdx.x * kEach; round < number; round += stride) {
    float y[L];
    if (!kAhead) next.read(job.data, at.row * job.stride + at.col);
    next.get(y);
    const Spot now = at;
    step();
    at = spot();
    if (kAhead && round + stride < number) next.read(job.data, at.row * job.stride + at.col);
    const uint32_t magnitude = quantize_row<S>(job, whole, y, now.row, now.col, now.inside);
    top = magnitude > top ? magnitude : top;
  }
  raise(job, top, whole.largest);
}

// Two strips of L elements for each thread. Neighbouring lanes exchange: along the contracted dimension where a
// rotation is longer than L, over the rows of a block of several.
template <class S, bool WIDE>
__device__ __forceinline__ void transposed_tile(const Job& job, const Whole& whole, const uint4* tile, int col,
                                                int row) {
  constexpr int L = S::L;
  static_assert(S::kStrips * S::kColumns == 2 * kThreads, "two strips a thread");
  uint32_t top = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < 2 * kThreads; i += kThreads) {
    const int strip = S::BR == 1 ? i % S::kStrips : i / S::kColumns;
    const int column = S::BR == 1 ? i / S::kStrips : i % S::kColumns;
    float y[L];
    tile_column<L, S::kColumns, WIDE>(tile, strip * L, column, y);
    if (!WIDE && job.source >= kCodesE4M3) {
#pragma unroll
      for (int j = 0; j < L; ++j) y[j] = y[j] * whole.post;
    }
    const int r = row + column, c = col + strip * L;
    const uint32_t found = quantize_row<S>(job, whole, y, r, c, r < job.rows && c < job.cols);
    top = found > top ? found : top;
  }
  raise(job, top, whole.largest);
}

// Tiles of the transpose: memory is [job.cols, job.rows].
template <class S, bool WIDE>
__global__ void __launch_bounds__(kThreads, WIDE ? 2 : S::kResidentTurned)
    columns_kernel(const __grid_constant__ Job job) {
  if (needless<S>(job)) return;
  FP4DIST_DYNAMIC_SHARED(memory);
  auto* tile = reinterpret_cast<uint4*>(memory);
  const int across = (job.rows + S::kColumns - 1) / S::kColumns;
  const int col = blockIdx.x / across * kDepth, row = blockIdx.x % across * S::kColumns;
  fill_tile<S::kColumns, WIDE>(job, tile, col, row);
  const Whole whole = whole_of<S>(job);
  wait_for_copies();
  __syncthreads();
  transposed_tile<S, WIDE>(job, whole, tile, col, row);
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
  fill_tile<B::kColumns, false>(b, tile, row, col);
  const Whole of_a = whole_of<A>(a);
  wait_for_copies();
  __syncthreads();
  uint32_t top = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < kDepth * kStrips; i += kThreads) {
    const int r = row + i / kStrips, c = col + i % kStrips * L;
    float y[L];
    tile_row<L, B::kColumns>(tile, i / kStrips, i % kStrips, y);
    const uint32_t found = quantize_row<A>(a, of_a, y, r, c, r < a.rows && c < a.cols);
    top = found > top ? found : top;
  }
  raise(a, top, of_a.largest);
  transposed_tile<B, false>(b, whole_of<B>(b), tile, row, col);
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
