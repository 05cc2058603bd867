// What a thread does with its elements once it has read them, and what a block of threads found.
#pragma once

#include "flips.cuh"
#include "round.cuh"

namespace fp4dist {

// Quantizes the L elements y of a row at (row, col), which have the signs of its rotation; `inside` is false for a
// thread without an element of its own, which takes part in exchanges only. Gives magnitude bits for `top`.
template <class S>
__device__ __forceinline__ uint32_t quantize_row(const Job& job, const Whole& whole, float (&y)[S::L], int row, int col,
                                                 bool inside) {
  constexpr int E = S::E, L = S::L;
  if constexpr (S::ROT > 1) butterflies<S::ROT>(y);
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

// Two columns of bf16: L words of two elements, one under the other. The first one, in the lower halves, is row `row`
// of the output, the second one that NEXT rows on.
template <class S, int NEXT>
__device__ __forceinline__ uint32_t quantize_columns(const Job& job, const Whole& whole, const uint32_t (&words)[S::L],
                                                     int row, int col) {
  uint32_t top = 0, half = 0x1044u;  // as bytes_of has it: the lower half above zeros
#pragma unroll 1
  for (int i = 0; i < 2; ++i, half = 0x3244u) {
    float y[S::L];
#pragma unroll
    for (int j = 0; j < S::L; ++j) y[j] = floats(bytes_of(words[j], 0u, half));
    if (job.source >= kCodesE4M3) {
#pragma unroll
      for (int j = 0; j < S::L; ++j) y[j] = y[j] * whole.post;
    }
    const int r = row + i * NEXT;
    const uint32_t found = quantize_row<S>(job, whole, y, r, col, r < job.rows && col < job.cols);
    top = found > top ? found : top;
  }
  return top;
}

}  // namespace fp4dist
