// Signs of a rotation, as masks in shared memory that flip two bf16 of a word at once: shifting a bit of them to where
// an element has its sign takes more instructions than the rotation.
#pragma once

#include "block.cuh"

namespace fp4dist {

// Signs that the columns of a matrix have before they repeat.
template <int ROT>
constexpr int kSigns = ROT > 32 ? ROT : 32;

// Masks of columns 2 i and 2 i + 1 of a row (PAIRS), or of column i for two rows; null without signs. All threads of a
// block call this and pass a barrier before they read.
template <int ROT, bool PAIRS>
__device__ __forceinline__ const uint32_t* masks_of(const Signs& signs) {
  if constexpr (ROT == 1) {
    return nullptr;
  } else {
    constexpr uint32_t kMasks = PAIRS ? kSigns<ROT> / 2 : kSigns<ROT>;
    __shared__ uint4 masks[kMasks / 4];
    if (signs.mode == 0) return nullptr;
    auto* words = reinterpret_cast<uint32_t*>(masks);
    if (const uint32_t i = threadIdx.x; i < kMasks) {
      const uint32_t first = PAIRS ? 2 * i : i, found = sign_word<ROT>(signs, first / 32) >> (first % 32);
      words[i] = (found & 1u) << 15 | (found >> (PAIRS ? 1 : 0) & 1u) << 31;
    }
    return words;
  }
}

__device__ __forceinline__ uint4 flipped(const uint4& v, const uint4& mask) {
  return {v.x ^ mask.x, v.y ^ mask.y, v.z ^ mask.z, v.w ^ mask.w};
}

// VECTORS times eight bf16 of a row from column `col` on; masks of PAIRS.
template <int ROT, int VECTORS>
__device__ __forceinline__ void flip_pairs(const uint32_t* masks, uint32_t col, uint4 (&v)[VECTORS]) {
  const auto* from = reinterpret_cast<const uint4*>(masks + col % kSigns<ROT> / 2);
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) v[i] = flipped(v[i], from[i]);
}

// Words of two rows from column `col` on; masks of columns.
template <int ROT, int L>
__device__ __forceinline__ void flip_columns(const uint32_t* masks, uint32_t col, uint32_t (&words)[L]) {
  const auto* from = reinterpret_cast<const uint4*>(masks + col % kSigns<ROT>);
#pragma unroll
  for (int i = 0; i < L / 4; ++i) {
    const uint4 mask = from[i];
    words[4 * i] ^= mask.x, words[4 * i + 1] ^= mask.y, words[4 * i + 2] ^= mask.z, words[4 * i + 3] ^= mask.w;
  }
}

}  // namespace fp4dist
