// One block of elements: its scale, its codes, its values, and where they are stored.
#pragma once

#include "decode.h"
#include "scales.cuh"
#include "tile.cuh"

namespace fp4dist {

// What a quantizer is compiled for. E: columns of a block; BR: its rows; ROT: size of the rotation, 1 for none;
// RULE: kAmax, kFourOverSix, kEden, kMeasure, kFloor (for all powers of two of the amax) or kQuestFloor (for both).
template <int E_, int BR_, int ROT_, Rule RULE_, bool NOISY_>
struct Side {
  static constexpr int E = E_, BR = BR_, ROT = ROT_;
  static constexpr Rule RULE = RULE_;
  static constexpr bool NOISY = NOISY_;
  // elements of a row that a thread has (under noise, which needs registers, fewer), and of them those of one block
  static constexpr int L = !NOISY && (E == 32 || ROT >= 32) ? 32 : 16;
  static constexpr int W = E < L ? E : L;
  static constexpr int kColumns = 4 * L;      // of a tile in memory
  static constexpr int kStrips = kDepth / L;  // threads side by side along the contracted dimension
  // resident blocks of threads that registers are to leave room for
  static constexpr bool kThree =
      RULE == kFourOverSix || RULE == kFloor || (RULE == kEden && ROT == 128) || (NOISY && ROT == 1);
  static constexpr int kResident = kThree ? 3 : (L == 32 ? 2 : 4);
  static constexpr int kResidentTurned = L == 32 ? (RULE == kFloor && ROT == 1 ? 3 : 2) : (NOISY ? 3 : kResident);
  static constexpr bool kTensorScale = RULE == kAmax || RULE == kFourOverSix;
  static constexpr bool kPowers = RULE == kFloor || RULE == kQuestFloor;
};

// What a thread knows of the whole tensor. Every thread finds it out itself, while its first elements are on their way:
// a block that waited for one of its threads would stand still for as long as it works.
struct Whole {
  float raw_factor, unit;  // s_enc / v; 1 / s_enc
  float post;              // multiplies elements read as bf16 code * scale
  int largest;             // narrow: the scale byte at the top of the FP8 type
  uint32_t signs;          // of this thread's elements, 32 in a row
  Moment now;
};

__device__ __forceinline__ uint32_t below_254(uint32_t byte) { return byte < 254u ? byte : 254u; }

template <class S>
__device__ __forceinline__ Whole whole_of(const Job& job) {
  Whole whole{0.0f, 1.0f, 1.0f, 0, 0u, moment(job.noise)};
  if constexpr (S::kPowers) {
    if (job.narrow) whole.largest = static_cast<int>(below_254(job.memory[kLargestBefore] + kHeadroom));
  }
  if (job.source >= kCodesE4M3) whole.post = *job.q_global;
  if constexpr (S::ROT > 1) whole.signs = sign_word<S::ROT>(job.signs, threadIdx.x % 4);
  if constexpr (S::kTensorScale) {
    const uint32_t found = *job.outer;
    const float amax = floats(found < kInfinity ? found : kInfinity);
    float s_enc = below(__fdiv_rn(job.numerator, amax), kMaxFloat);
    s_enc = amax == 0.0f || s_enc == 0.0f ? 1.0f : s_enc;
    whole.unit = __fdiv_rn(1.0f, s_enc);
    whole.raw_factor = s_enc * job.inverse_v;
    if (blockIdx.x == 0 && threadIdx.x == 0) *job.global_scale = found < kInfinity ? whole.unit : not_a_number();
  }
  return whole;
}

// Number of an element. Unsigned, as all places here: dividing what might be negative takes several instructions more.
__device__ __forceinline__ uint64_t element_at(const Job& job, int row, int col) {
  return static_cast<uint64_t>(static_cast<uint32_t>(row)) * static_cast<uint32_t>(job.cols) +
         static_cast<uint32_t>(col);
}

template <class S>
__device__ __forceinline__ void store_scale(const Job& job, int row, int col, uint32_t byte) {
  auto* scales = static_cast<uint8_t*>(job.scales);
  const uint32_t r = static_cast<uint32_t>(row), k = static_cast<uint32_t>(col) / S::E;
  if (job.swizzled) {
    scales[scale_at(row, static_cast<int>(k), job.cols / S::E, true)] = static_cast<uint8_t>(byte);
  } else if (S::BR == 1) {
    scales[element_at(job, row, col) / S::E] = static_cast<uint8_t>(byte);
  } else if (r % S::BR == 0) {
    const uint32_t blocks = static_cast<uint32_t>(job.cols) / S::E;
    scales[static_cast<uint64_t>(r / S::BR) * blocks + k] = static_cast<uint8_t>(byte);
  }
}

// WORDS words of codes times their scale as bf16, from element `at` of `to` on if it is not negative. From codes, since
// levels kept beside them would take registers of all.
template <int WORDS>
__device__ __forceinline__ void store_values(uint32_t* to, int64_t at, const uint32_t* words, float scale) {
  uint4 out[WORDS];
#pragma unroll
  for (int g = 0; g < WORDS; ++g) {
    uint32_t four[4];
    bf16x8_values(words[g], scale, four);
    out[g] = {four[0], four[1], four[2], four[3]};
  }
  store_paired(to, 2 * at, out);
}

template <int WORDS>
__device__ __forceinline__ void store_codes(uint32_t* to, const uint32_t* words) {
  if constexpr (WORDS == 2) {
    *reinterpret_cast<uint2*>(to) = {words[0], words[1]};
  } else {
    *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
  }
}

// The FP8 values of WORDS words of codes under one scale, from element `at` of `to` on if it is not negative; whether
// the type held all of them.
template <int MANTISSA, int WORDS>
__device__ __forceinline__ bool store_fp8(uint32_t* to, int64_t at, const uint32_t* words, uint32_t byte, int largest) {
  const int exponent = static_cast<int>(byte) - largest + Fp8<MANTISSA>::highest;
  const bool nothing = byte == 255u;  // words of kNanCodes
  const Levels levels = nothing ? Levels{0x7f7f7f7fu, 0x7f7f7f7fu} : fp8_levels<MANTISSA>(exponent);
  uint4 out[WORDS / 2];
  uint32_t some = 0;
#pragma unroll
  for (int i = 0; i < WORDS / 2; ++i) {
    uint32_t four[4];
    fp8x8_values(words[2 * i], levels, four);
    fp8x8_values(words[2 * i + 1], levels, four + 2);
    out[i] = {four[0], four[1], four[2], four[3]};
    some |= words[2 * i] | words[2 * i + 1];
  }
  if constexpr (WORDS == 2) {
    if (at >= 0) reinterpret_cast<uint4*>(to)[at / 16] = out[0];
  } else {
    store_paired(to, at, out);
  }
  return nothing || (some & kNanCodes) == 0 || exponent >= Fp8<MANTISSA>::lowest;
}

// Rounds eight values u (under noise their magnitudes, with the signs of y): a code word, and the levels of the
// magnitudes.
template <class S>
__device__ __forceinline__ uint32_t round_eight(const float* u, const float* y, const Words& noise, float* level) {
  return S::NOISY ? e2m1x8_stochastic(u, y, noise.w, level) : e2m1x8_nearest(u, level);
}

// Where a block stands; `inside` is false for a thread without elements of its own, which takes part in exchanges only.
struct Spot {
  int row, col;
  bool inside;
};

// The scale of a block: what is stored, its value, what multiplies an element before it is rounded, and before that.
struct Scale {
  uint32_t byte;
  float value, multiplier;
};

// The noise of eight elements from `col` on.
__device__ __forceinline__ Words noise_of_eight(const Job& job, const Moment& now, int row, int col) {
  const uint32_t line = global_row(job.noise, static_cast<uint32_t>(row)) * job.noise.width;
  return draw(job.noise, now, line + global_group(job.noise, static_cast<uint32_t>(col / 8)));
}

// COUNT bits of elements from number `at` on.
template <int COUNT>
__device__ __forceinline__ void store_kept(uint32_t* to, uint64_t at, uint32_t kept) {
  if constexpr (COUNT == 32) {
    to[at / 32] = kept;
  } else {
    reinterpret_cast<uint16_t*>(to)[at / 16] = static_cast<uint16_t>(kept);
  }
}

// Rounds and stores a thread's part y of a block under a scale; leaves its code words to the caller.
template <class S>
__device__ __forceinline__ void round_block(const Job& job, const Whole& whole, const Spot& spot, const Scale& scale,
                                            const float* y, uint32_t* words) {
  const float before = S::kPowers && job.rule == kFloor ? job.before : 1.0f;
  const uint64_t at = element_at(job, spot.row, spot.col);
  uint32_t kept = 0;
#pragma unroll
  for (int g = 0; g < S::W / 8; ++g) {
    float u[8], level[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float z = S::kPowers ? y[8 * g + i] * before : y[8 * g + i];
      u[i] = z * scale.multiplier;  // nearest rounding saturates by itself
    }
    if (S::kPowers && job.kept) {
#pragma unroll
      for (int i = 0; i < 8; ++i) kept |= fabsf(u[i]) <= 6.0f ? 1u << (8 * g + i) : 0u;
    }
    if constexpr (S::NOISY) {
#pragma unroll
      for (int i = 0; i < 8; ++i) u[i] = at_most(fabsf(u[i]), 6.0f);
    }
    Words noise{};
    if constexpr (S::NOISY) noise = noise_of_eight(job, whole.now, spot.row, spot.col + 8 * g);
    words[g] = round_eight<S>(u, y + 8 * g, noise, level);
    if (scale.value != scale.value) words[g] = kNanCodes;
  }
  if (job.values && !(S::kPowers && job.narrow)) {
    store_values<S::W / 8>(job.values, spot.inside ? static_cast<int64_t>(at) : -1, words, scale.value);
  }
  if constexpr (S::kPowers) {
    if (spot.inside && job.kept) store_kept<S::W>(job.kept, at, kept);
    if (job.narrow && job.values) {
      const int64_t to = spot.inside ? static_cast<int64_t>(at) : -1;
      const bool fits = job.narrow == 2 ? store_fp8<2, S::W / 8>(job.values, to, words, scale.byte, whole.largest)
                                        : store_fp8<3, S::W / 8>(job.values, to, words, scale.byte, whole.largest);
      if (!fits && spot.inside) job.memory[kMisfits] = 1;  // from any thread: all write the same
    }
  }
}

// Whether only a power-of-two quantizer's FP8 values are wanted: then they are rounded in the FP8 type's own units.
__device__ __forceinline__ bool values_alone(const Job& job) { return job.narrow && !job.codes; }

// The smallest scale byte under which no arithmetic on an element that counts is subnormal.
constexpr uint32_t kUsual = 30;

// FP8 values of a thread's part y of a block as by codes, which are not made, and its byte. All is exact but one
// product and the rounding to the grid; memory hears of blocks where it may not be, or of which something is lost.
template <int MANTISSA, class S>
__device__ __forceinline__ uint32_t quantize_values(const Job& job, const Whole& whole, const Spot& spot,
                                                    const float* y) {
  using F = Fp8<MANTISSA>;
  float amax = largest_of_rows<S::BR>(largest<S::W>(y));
  if constexpr (S::W < S::E) amax = max_magnitude(amax, __shfl_xor_sync(kWarp, amax, 1));
  const uint32_t byte = power_byte(amax, job);
  const int exponent = static_cast<int>(byte) - whole.largest + F::highest, top = F::highest + 254 - whole.largest;
  const bool fits = amax == 0.0f || (bits(amax) < kInfinity && byte >= kUsual && exponent >= F::lowest);
  const float unit = floats(static_cast<uint32_t>((exponent < F::lowest ? F::lowest : exponent) + 127) << 23);
  const float factor = floats(static_cast<uint32_t>(top < 240 ? top : 240) << 23) * job.before;
  uint4 out[S::W / 16];
#pragma unroll
  for (int g = 0; g < S::W / 8; ++g) {
    Words noise{};
    if constexpr (S::NOISY) noise = noise_of_eight(job, whole.now, spot.row, spot.col + 8 * g);
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const float* z = y + 8 * g + i;
      if constexpr (S::NOISY) {
        v[i] = scaled_stochastic<0>(fabsf(z[0]) * factor, z[0], unit, noise.w[i / 2]);
        v[i + 1] = scaled_stochastic<1>(fabsf(z[1]) * factor, z[1], unit, noise.w[i / 2]);
      } else {
        v[i] = scaled_nearest(z[0] * factor, unit);
        v[i + 1] = scaled_nearest(z[1] * factor, unit);
      }
    }
    const uint32_t low = fp8x4_nearest<MANTISSA>(v), high = fp8x4_nearest<MANTISSA>(v + 4);
    if (g % 2 == 0) {
      out[g / 2].x = low, out[g / 2].y = high;
    } else {
      out[g / 2].z = low, out[g / 2].w = high;
    }
  }
  const int64_t at = spot.inside ? static_cast<int64_t>(element_at(job, spot.row, spot.col)) : -1;
  if constexpr (S::W == 16) {
    if (at >= 0) reinterpret_cast<uint4*>(job.values)[at / 16] = out[0];
  } else {
    store_paired(job.values, at, out);
  }
  if (!fits && spot.inside) job.memory[kMisfits] = 1;  // from any thread: all write the same
  return byte;
}

// Code words of a block under a scale, and the error of their values over the whole block.
template <class S>
__device__ __forceinline__ float try_scale(const float* y, const Scale& scale, float unit, int metric,
                                           uint32_t* words) {
  constexpr int G = S::E / 8;
  static_assert(G == 2, "blocks of sixteen");
  float part[G];
#pragma unroll
  for (int g = 0; g < G; ++g) {
    float u[8], d[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) u[i] = y[8 * g + i] * scale.multiplier;
    words[g] = e2m1x8_nearest(u, d);
#pragma unroll
    for (int i = 0; i < 8; ++i) d[i] = fabsf(y[8 * g + i]) - d[i] * scale.value * unit;
    if (metric == 2) {
      part[g] = largest<8>(d);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) d[i] = metric == 0 ? d[i] * d[i] : fabsf(d[i]);
      part[g] = tree_sum<8>(d);
    }
  }
  if (metric == 2) return largest_of_rows<S::BR>(max_magnitude(part[0], part[1]));
  return sum_of_rows<S::BR>(part[0] + part[1]);
}

// The better of two E4M3 scales; see FourOverSix in fp4dist/spec/blocks.py.
template <class S>
__device__ __forceinline__ void best_of_two(const Job& job, float unit, const Spot& spot, Scale& scale, float raw,
                                            const float* y, uint32_t* words) {
  constexpr int E = S::E;
  Scale other;
  other.byte = e4m3_nearest(raw * 1.5f);
  other.value = e4m3_value(other.byte);
  other.multiplier = multiplier_of(other.value, unit);
  uint32_t other_words[E / 8];
  const float error = try_scale<S>(y, scale, unit, job.metric, words);
  const bool better = try_scale<S>(y, other, unit, job.metric, other_words) < error;
  if (better) scale = other;
#pragma unroll
  for (int g = 0; g < E / 8; ++g) {
    words[g] = better ? other_words[g] : words[g];
    if (scale.value != scale.value) words[g] = kNanCodes;
  }
  if (!job.values) return;
  const auto at = static_cast<int64_t>(element_at(job, spot.row, spot.col));
  store_values<E / 8>(job.values, spot.inside ? at : -1, words, scale.value);
}

// Scale, codes and values of one block, or of this thread's part y of it, of every rule but MS-EDEN; its byte.
template <class S>
__device__ __forceinline__ uint32_t quantize_block(const Job& job, const Whole& whole, const Spot& spot, const float* y,
                                                   uint32_t* words) {
  float amax = largest_of_rows<S::BR>(largest<S::W>(y));
  if constexpr (S::W < S::E) amax = max_magnitude(amax, __shfl_xor_sync(kWarp, amax, 1));
  static_assert(S::W == S::E || (S::W * 2 == S::E && S::RULE == kFloor), "a block of one thread, or of two");
  Scale scale;
  if constexpr (S::kTensorScale) {
    const float raw = amax * whole.raw_factor;
    scale.byte = e4m3_nearest(raw);
    if (job.nonzero && scale.byte == 0) scale.byte = 1;
    scale.value = e4m3_value(scale.byte);
    scale.multiplier = multiplier_of(scale.value, whole.unit);
    if constexpr (S::RULE == kFourOverSix) {
      best_of_two<S>(job, whole.unit, spot, scale, raw, y, words);
      return scale.byte;
    }
  } else {
    float found = amax;
    if constexpr (S::RULE == kQuestFloor) found = quest_step<S::E>(y, amax, job) + 1e-8f;
    scale.byte = power_byte(found, job);
    scale.value = e8m0_value(scale.byte);
    scale.multiplier = e8m0_reciprocal(scale.byte);
    if (job.rule == kCeilAmax) scale.multiplier = scale.multiplier * 6.0f;
    scale.multiplier = below(scale.multiplier, kMaxFloat);
  }
  round_block<S>(job, whole, spot, scale, y, words);
  return scale.byte;
}

// MS-EDEN's codes of one block, and its corrected scale.
template <class S>
__device__ __forceinline__ float choose_eden(const Job& job, const float* y, uint32_t* words) {
  constexpr int E = S::E;
  const float q = __fdiv_rn(largest<E>(y), job.v);
  const float multiplier = q < kMinNormal ? 0.0f : __fdiv_rn(1.0f, q);
  float u[E], level[E], squares[E];
#pragma unroll
  for (int i = 0; i < E; ++i) u[i] = y[i] * multiplier;
#pragma unroll
  for (int g = 0; g < E / 8; ++g) words[g] = e2m1x8_nearest(u + 8 * g, level + 8 * g);
#pragma unroll
  for (int i = 0; i < E; ++i) {
    level[i] = fabsf(u[i]) * level[i];
    squares[i] = u[i] * u[i];
  }
  const float products = tree_sum<E>(level);
  const float s = __fdiv_rn(tree_sum<E>(squares), products);
  const float corrected = q * (products == 0.0f ? 1.0f : s);
  if (!(fabsf(corrected) < floats(kInfinity))) {  // rare: the codes of NaN have no sign
#pragma unroll
    for (int g = 0; g < E / 8; ++g) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (u[8 * g + i] != u[8 * g + i]) words[g] = (words[g] & ~(15u << (4 * i))) | (7u << (4 * i));
      }
    }
  }
  return corrected;
}

}  // namespace fp4dist
