// What the general kernels (grid, filter) do alike: a thread has sixteen neighbouring elements of a row, and what the
// specialised ones know when they are compiled is asked of the job here.
#pragma once

#include "formats.cuh"
#include "grid.h"
#include "round.cuh"

namespace fp4dist {

constexpr int kStrip = 16;

// A stored scale -> its value.
__device__ __forceinline__ float stored_scale(const void* scales, int64_t at, int kind) {
  if (kind == kFloat32) return static_cast<const float*>(scales)[at];
  const uint32_t byte = static_cast<const uint8_t*>(scales)[at];
  if (kind == kE8M0) return e8m0_value(byte);
  if (kind == kUE5M3) return ue5m3_value(byte);
  const float value = e4m3_value(byte);
  return kind == kInverse ? __fdiv_rn(1.0f, value) : value;
}

// The 32 sign bits that a rotation of `size` gives the columns from col / 32 * 32 on.
__device__ __forceinline__ uint32_t signs_at(const Signs& signs, int size, int col) {
  if (size == 1 || signs.mode == 0) return 0;
  Words found{{signs.words[0], signs.words[1], signs.words[2], signs.words[3]}};
  if (signs.mode == 2) found = draw(signs.place, moment(signs.place), 0);
  const uint32_t which = size > 32 ? static_cast<uint32_t>(col / 32) % static_cast<uint32_t>(size / 32) : 0u;
  const uint32_t word = which == 0 ? found.w[0] : which == 1 ? found.w[1] : which == 2 ? found.w[2] : found.w[3];
  return size == 16 ? (word & 0xffffu) * 0x10001u : word;
}

// +-1 butterflies of groups of `size` columns, 1 for none: neighbouring lanes have neighbouring strips.
__device__ __forceinline__ void turn(float (&y)[kStrip], int size) {
  if (size == 1) return;
  butterflies<kStrip>(y);
  for (int lanes = 1; lanes < size / kStrip; lanes *= 2) {
    const float sign = threadIdx.x & lanes ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kStrip; ++i) y[i] = fmaf(y[i], sign, __shfl_xor_sync(kWarp, y[i], lanes));
  }
}

// The unnormalized rotation of a strip at column `col`.
__device__ __forceinline__ void rotate_strip(float (&y)[kStrip], int size, uint32_t signs, int col) {
  flip(y, signs >> (col % 32));
  turn(y, size);
}

}  // namespace fp4dist
