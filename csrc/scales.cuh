// Where a block's scale stands.
#pragma once

#include "portable.cuh"

namespace fp4dist {

// Of row m and block k, among `blocks` of a row: in order, or in tiles of 128 x 4 as tcgen05 and cuBLASLt read them
// (fp4dist/numerics/layout.py).
__host__ __device__ __forceinline__ int64_t scale_at(int64_t m, int k, int blocks, bool swizzled) {
  if (!swizzled) return m * blocks + k;
  return (m / 128 * ((blocks + 3) / 4) + k / 4) * 512 + m % 32 * 16 + m / 32 % 4 * 4 + k % 4;
}

}  // namespace fp4dist
