// Transposes that are read into registers, without shared memory: where two elements of bf16, or eight codes, of
// neighbouring columns of memory are an aligned word.
#pragma once

#include "row.cuh"

namespace fp4dist {

// Whether all words of two neighbouring columns of memory lie within it.
inline bool is_direct(const Job& job) {
  return job.turned && job.source == kBFloat16 && reinterpret_cast<uintptr_t>(job.data) % 4 == 0 &&
         job.stride % 2 == 0 && job.stride < INT32_MAX / kDepth && job.rows % 2 == 0;
}

// Whether eight codes of a row of memory are an aligned word, under one scale.
inline bool is_held(const Job& job) {
  const auto power = [](int n) { return n > 0 && (n & (n - 1)) == 0; };
  return job.turned && job.source >= kCodesE4M3 && reinterpret_cast<uintptr_t>(job.data) % 4 == 0 &&
         job.stride % 4 == 0 && job.rows % 8 == 0 && power(job.q_rows) && power(job.q_cols) && job.q_cols % 8 == 0;
}

constexpr int kHeldColumns = 8 * 2 * kThreads / 16;  // of memory: what a block of held_kernel has of a tile's depth

// The transpose of a bf16 matrix that `is_direct`, without shared memory: a thread has L words of two neighbouring
// columns of memory, all of which are on their way at once.
template <class S>
__global__ void __launch_bounds__(kThreads, S::L == 32 ? 2 : S::kResidentTurned)
    direct_kernel(const __grid_constant__ Job job) {
  if (needless<S>(job)) return;
  constexpr int L = S::L;
  constexpr int kAlong = L == 32 && S::ROT <= 64 ? 2 : 4;  // lanes side by side along the contracted dimension
  static_assert(S::BR == 1 && S::ROT <= L * kAlong, "a rotation within a warp");
  constexpr int kPairs = 32 / kAlong, kGroups = S::kStrips / kAlong;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int across = (job.rows + S::kColumns - 1) / S::kColumns;
  const int first_col = blockIdx.x / across * kDepth, first_row = blockIdx.x % across * S::kColumns;
  const int col = first_col + (warp % kGroups * kAlong + lane % kAlong) * L;
  const int row = first_row + (warp / kGroups * kPairs + lane / kAlong) * 2;
  const bool inside = row < job.rows && col < job.cols;
  // the first element of the block's tile, and 32 bits from there
  const auto* tile = static_cast<const uint16_t*>(job.data) + first_col * job.stride + first_row;
  const auto step = static_cast<uint32_t>(job.stride);
  uint32_t at = inside ? static_cast<uint32_t>(col - first_col) * step + static_cast<uint32_t>(row - first_row) : 0u;
  uint32_t words[L];
#pragma unroll
  for (int i = 0; i < L; ++i, at += step) words[i] = __ldg(reinterpret_cast<const uint32_t*>(tile + at));
  const Whole whole = whole_of<S>(job);
  const uint32_t* masks = masks_of<S::ROT, false>(job.signs);
  if (masks) {
    __syncthreads();
    flip_columns<S::ROT>(masks, col, words);
  }
  raise(job, quantize_columns<S, 1>(job, whole, words, row, col), whole.largest);
}

// The transpose of codes that are `held`: a thread has L words of eight codes, one under the other, which are eight
// rows of the output; two of them at a time are decoded, numbers i and i + 4.
template <class S>
__global__ void __launch_bounds__(kThreads, 2) held_kernel(const __grid_constant__ Job job) {
  if (needless<S>(job)) return;
  constexpr int L = S::L, kAlong = 4;
  static_assert(S::BR == 1 && L == 16 && S::ROT <= L * kAlong, "a rotation within a warp, room for words and scales");
  constexpr int kGroups = S::kStrips / kAlong;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int across = (job.rows + kHeldColumns - 1) / kHeldColumns;
  const int col = blockIdx.x / across * kDepth + (warp % kGroups * kAlong + lane % kAlong) * L;
  const int row = blockIdx.x % across * kHeldColumns + (warp / kGroups * (32 / kAlong) + lane / kAlong) * 8;
  const bool inside = row < job.rows && col < job.cols;
  const ScalePlaces places(job);
  const uint8_t* from = codes_at(job, inside ? col : 0, inside ? row : 0);
  uint32_t words[L], scales[L], bytes[L];
#pragma unroll
  for (int j = 0; j < L; ++j) words[j] = __ldg(reinterpret_cast<const uint32_t*>(from + j * job.stride));
#pragma unroll
  for (int j = 0; j < L; ++j) bytes[j] = __ldg(job.q_scales + (inside ? places.at<true>(col + j, row) : 0u));
  const Whole whole = whole_of<S>(job);
  const uint32_t* masks = masks_of<S::ROT, false>(job.signs);
  if (masks) __syncthreads();
#pragma unroll
  for (int j = 0; j < L; ++j) {
    const float scale = scale_value(job, bytes[j]);
    scales[j] = bf16x2_exact(scale, scale);
  }
  uint32_t top = 0;
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    uint32_t pairs[L];
#pragma unroll
    for (int j = 0; j < L; ++j) pairs[j] = bf16x2_of_codes(words[j] << (12 - 4 * i), scales[j]);
    if (masks) flip_columns<S::ROT>(masks, col, pairs);
    const uint32_t found = quantize_columns<S, 4>(job, whole, pairs, row + i, col);
    top = found > top ? found : top;
  }
  raise(job, top, whole.largest);
}

}  // namespace fp4dist
