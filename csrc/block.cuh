// A thread's arithmetic on its elements: rotation, statistics and scales, in the order of fp4dist/numerics. Nothing
// here may be contracted (-fmad=false): each operation rounds once.
#pragma once

#include "convert.cuh"
#include "noise.cuh"

namespace fp4dist {

constexpr uint32_t kWarp = 0xffffffffu;

// Unnormalized Hadamard of groups of SIZE elements of a row; a thread has L of them, its neighbours the rest. Strides
// 1, 2, 4 ... in this order.
template <int SIZE, int L, int STRIDE = 1>
__device__ __forceinline__ void butterflies(float (&y)[L]) {
  if constexpr (STRIDE < SIZE) {
    if constexpr (STRIDE < L) {
#pragma unroll
      for (int i = 0; i < L; ++i) {
        if (i & STRIDE) continue;
        const float a = y[i], b = y[i + STRIDE];
        y[i] = a + b;
        y[i + STRIDE] = a - b;
      }
    } else {
      const float sign = threadIdx.x & (STRIDE / L) ? -1.0f : 1.0f;
#pragma unroll
      for (int i = 0; i < L; ++i) y[i] = fmaf(y[i], sign, __shfl_xor_sync(kWarp, y[i], STRIDE / L));
    }
    butterflies<SIZE, L, 2 * STRIDE>(y);
  }
}

// Flips the signs of L elements: bit i of `word` belongs to element i.
template <int L>
__device__ __forceinline__ void flip(float (&y)[L], uint32_t word) {
#pragma unroll
  for (int i = 0; i < L; ++i) y[i] = floats(bits(y[i]) ^ ((word << (31 - i)) & kSign));
}

// The 32 sign bits of a rotation that a thread flips: word number `which` of its 128, or the bits of a smaller one,
// repeated.
template <int ROT>
__device__ __forceinline__ uint32_t sign_word(const Signs& signs, uint32_t which) {
  uint32_t word = 0;
  if (signs.mode == 1) {
    word = signs.words[0];
    if (ROT > 32) word = which == 0 ? word : which == 1 ? signs.words[1] : which == 2 ? signs.words[2] : signs.words[3];
  } else if (signs.mode == 2) {
    const Words drawn = draw(signs.place, moment(signs.place), 0);
    word = drawn.w[0];
    if (ROT > 32) word = which == 0 ? word : which == 1 ? drawn.w[1] : which == 2 ? drawn.w[2] : drawn.w[3];
  }
  return ROT == 16 ? (word & 0xffffu) * 0x10001u : word;
}

// Stores a thread's VECTORS neighbouring vectors from byte `at` of `to` on; a thread with a negative `at` has none. All
// lanes of a warp take part: two of them store 32 neighbouring bytes at a time, the least that memory takes whole.
template <int VECTORS>
__device__ __forceinline__ void store_paired(void* to, long long at, const uint4 (&v)[VECTORS]) {
  static_assert(VECTORS % 2 == 0, "pairs");
  const bool odd = threadIdx.x & 1;
  const long long other = __shfl_xor_sync(kWarp, at, 1), even_at = odd ? other : at, odd_at = odd ? at : other;
  auto* of_even = reinterpret_cast<uint4*>(static_cast<unsigned char*>(to) + even_at) + odd;
  auto* of_odd = reinterpret_cast<uint4*>(static_cast<unsigned char*>(to) + odd_at) + odd;
#pragma unroll
  for (int i = 0; i < VECTORS; i += 2) {
    const uint4 mine = odd ? v[i + 1] : v[i], theirs = odd ? v[i] : v[i + 1];
    const uint4 got = {__shfl_xor_sync(kWarp, theirs.x, 1), __shfl_xor_sync(kWarp, theirs.y, 1),
                       __shfl_xor_sync(kWarp, theirs.z, 1), __shfl_xor_sync(kWarp, theirs.w, 1)};
    if (even_at >= 0) of_even[i] = odd ? got : mine;
    if (odd_at >= 0) of_odd[i] = odd ? mine : got;
  }
}

// max |y| of N elements; NaN if one is.
template <int N>
__device__ __forceinline__ float largest(const float* y) {
  if constexpr (N == 2)
    return max_magnitude(y[0], y[1]);
  else
    return max_magnitude(largest<N / 2>(y), largest<N / 2>(y + N / 2));
}

// Sum of N values: adjacent pairs, as grouping.tree_sum.
template <int N>
__device__ __forceinline__ float tree_sum(const float* z) {
  if constexpr (N == 2)
    return z[0] + z[1];
  else
    return tree_sum<N / 2>(z) + tree_sum<N / 2>(z + N / 2);
}

// Over the BR rows of a block, which are neighbouring lanes: the largest; the sum in a tree.
template <int BR>
__device__ __forceinline__ float largest_of_rows(float found) {
#pragma unroll
  for (int lanes = 1; lanes < BR; lanes *= 2) found = max_magnitude(found, __shfl_xor_sync(kWarp, found, lanes));
  return found;
}

template <int BR>
__device__ __forceinline__ float sum_of_rows(float sum) {
#pragma unroll
  for (int lanes = 1; lanes < BR; lanes *= 2) sum = sum + __shfl_xor_sync(kWarp, sum, lanes);
  return sum;
}

// Quest's step for a block of E elements of one row.
template <int E>
__device__ __forceinline__ float quest_step(const float* y, float amax, const Job& job) {
  const uint32_t exponent = (bits(amax) >> 23) & 0xffu;
  const float unit = e8m0_value(exponent), inverse = e8m0_reciprocal(exponent);
  float z[E];
#pragma unroll
  for (int i = 0; i < E; ++i) z[i] = y[i] * inverse;
  if (job.about_mean) {
    const float mean = __fdiv_rn(tree_sum<E>(z), static_cast<float>(E));
#pragma unroll
    for (int i = 0; i < E; ++i) z[i] = z[i] - mean;
  }
#pragma unroll
  for (int i = 0; i < E; ++i) z[i] = z[i] * z[i];
  return __fsqrt_rn(__fdiv_rn(tree_sum<E>(z), static_cast<float>(E))) * job.factor * unit;
}

// E8M0 byte for a block's amax, or step: see numerics.scales._exponent_byte. 6 = 2^2 * 1.5.
__device__ __forceinline__ uint32_t power_byte(float found, const Job& job) {
  const uint32_t b = bits(found), rest = b & 0x7fffffu;
  const int own = static_cast<int>((b >> 23) & 0xffu);
  int byte = own;
  if (job.rule == kFloor) byte = own - 2;
  if (job.rule == kCeil) byte = own - 2 + (rest > 0x400000u);
  if (job.rule == kCeilAmax) byte = own + (rest > 0u);
  if (job.rule == kQuestNearest) byte = own + (rest > 0x3504f3u);
  byte = byte < 0 ? 0 : (byte > 254 ? 254 : byte);
  byte = own == 255 ? 255 : byte;
  if (job.rule == kCeilAmax) {
    const float share = found * e8m0_reciprocal(static_cast<uint32_t>(byte));
    byte -= share < job.finer && byte > 0;
  }
  return static_cast<uint32_t>(byte);
}

// E2M1's grid times `unit`, a power of two: the level nearest to z, ties to even, with its sign. |z| < 7 units.
// As e2m1_nearest_integer: adding 3 * 2^21 p rounds to p / 2, the step.
__device__ __forceinline__ float scaled_nearest(float z, float unit) {
  const float p = floats(bits(fmaxf(fabsf(z), unit)) & kInfinity);
  return floats(with_sign(bits(fmaf(p, -6291456.0f, fmaf(p, 6291456.0f, z))), z));
}

// As e2m1_stochastic_integer on that grid: a in [0, 6 units], with the sign of `sign`; HALF of `noise` is its own.
template <int HALF>
__device__ __forceinline__ float scaled_stochastic(float a, float sign, float unit, uint32_t noise) {
  const float one = a < unit ? unit : 0.0f;
  const uint32_t sum = less_noise<HALF>(bits(add_up(a, one)), noise) + 0x003fffdfu;
  return floats(with_sign(bits(floats(sum & 0xffc00000u) - one), sign));
}

// What multiplies an element before it is rounded, from an E4M3 scale in units of the tensor's.
__device__ __forceinline__ float multiplier_of(float scale, float unit) {
  return below(__fdiv_rn(1.0f, scale * unit), kMaxFloat);
}

}  // namespace fp4dist
