// Every conversion between fp32 and the codes of FP4 training, and the only code that differs between architectures.
//
// The contract is fp4dist/numerics/codes.py, bit for bit. Where the machine has an instruction with these bits it is
// used (FP4DIST_E2M1_HARDWARE: sm_100a, sm_103a, sm_120a; FP4DIST_E4M3_HARDWARE: sm_89 and newer); everywhere else, and
// on the host, the same function is integer arithmetic. Both forms stand side by side here, and nothing outside this
// file asks for an architecture. The integer forms of all functions were run; see README.md for what was not.
#pragma once

#include "portable.cuh"

#if defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM103_ALL) || defined(__CUDA_ARCH_FEAT_SM120_ALL)
#define FP4DIST_E2M1_HARDWARE 1
#endif
#if defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM103_ALL)
#define FP4DIST_E2M1_STOCHASTIC_HARDWARE 1  // absent on sm_120a
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define FP4DIST_E4M3_HARDWARE 1
#endif

namespace fp4dist {

constexpr float kMaxFloat = 3.4028234663852886e38f;
constexpr float kMinNormal = 1.1754943508222875e-38f;
constexpr uint32_t kSign = 0x80000000u;
constexpr uint32_t kInfinity = 0x7f800000u;
constexpr uint32_t kNanCodes = 0x77777777u;  // eight codes of a NaN, which has no sign

__host__ __device__ __forceinline__ uint32_t bits(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t b;
  __builtin_memcpy(&b, &x, 4);
  return b;
#endif
}

__host__ __device__ __forceinline__ float floats(uint32_t b) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(b);
#else
  float x;
  __builtin_memcpy(&x, &b, 4);
  return x;
#endif
}

__host__ __device__ __forceinline__ float not_a_number() { return floats(0x7fc00000u); }

// `word` with the code in the top four bits of `next` below its own.
__host__ __device__ __forceinline__ uint32_t with_code(uint32_t word, uint32_t next) {
#ifdef __CUDA_ARCH__
  return __funnelshift_l(next, word, 4);
#else
  return (word << 4) | (next >> 28);
#endif
}

// `word` with the sign of x in place of its top bit.
__host__ __device__ __forceinline__ uint32_t with_sign(uint32_t word, float x) {
#ifdef __CUDA_ARCH__
  uint32_t found;  // one instruction, where the compiler makes two of the same in C
  asm("lop3.b32 %0, %1, %2, %3, 0xd8;" : "=r"(found) : "r"(word), "r"(bits(x)), "r"(kSign));
  return found;
#else
  return (word & ~kSign) | (bits(x) & kSign);
#endif
}

// a + b rounded up, of a in [0, 6 b] and b a power of two, or of b = 0.
__host__ __device__ __forceinline__ float add_up(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_ru(a, b);
#else
  const float sum = a + b;
  const bool below = static_cast<double>(sum) - static_cast<double>(b) < static_cast<double>(a);  // both exact
  return floats(bits(sum) + (below ? 1u : 0u));
#endif
}

// An integer below 2^23 -> fp32, and a in [0, 2^22] -> the integer at or below it: additions, which run at four times
// the rate of the conversions I2F and F2I.
__host__ __device__ __forceinline__ float float_of(uint32_t n) { return floats(0x4b000000u | n) - 8388608.0f; }

__host__ __device__ __forceinline__ uint32_t whole_part(float a) {
#ifdef __CUDA_ARCH__
  return bits(__fadd_rd(a, 8388608.0f)) & 0x7fffffu;
#else
  const float sum = a + 8388608.0f;
  const bool above = static_cast<double>(sum) - 8388608.0 > static_cast<double>(a);
  return (bits(sum) - (above ? 1u : 0u)) & 0x7fffffu;
#endif
}

// min(x, limit); a NaN stays.
__host__ __device__ __forceinline__ float below(float x, float limit) { return x > limit ? limit : x; }

// An E2M1 code in the top four bits of a word -> its value; -0 stays.
__host__ __device__ __forceinline__ float e2m1_value(uint32_t nibble) {
  const uint32_t level = (nibble >> 6) & 0x01c00000u;  // exponent and mantissa where fp32 has them, 2^126 too small
  return floats(level | (nibble & kSign)) * 8.507059173023462e37f;
}

// ---- integer forms ----------------------------------------------------------------------------------------------

// u (any but NaN) -> level of its magnitude, and a word whose top four bits are the code: nearest, ties to even,
// saturating. Adding p (2^22 + 3), p = 2^floor(log2 max(|u|, 1)), rounds to the step p/2 of u's binade; the number of
// steps in the low bits and the exponent above then sum up to the index.
__host__ __device__ __forceinline__ uint32_t e2m1_nearest_integer(float u, float& level) {
  const float a = fminf(fabsf(u), 6.0f);
  const float p = floats(bits(fmaxf(a, 1.0f)) & kInfinity);
  const float rounded = fmaf(p, 4194307.0f, a);
  level = fmaf(p, -4194307.0f, rounded);
  return with_sign(bits(rounded) * 0x10000040u, u);
}

// b less 64 times the half (0: low, 1: high) of `noise`.
template <int HALF>
__host__ __device__ __forceinline__ uint32_t less_noise(uint32_t b, uint32_t noise) {
#ifdef __CUDA_ARCH__
  uint32_t found;
  asm("dp2a.lo.u32.s32 %0, %1, %2, %3;" : "=r"(found) : "r"(noise), "n"(HALF ? 0xc000 : 0xc0), "r"(b));
  return found;
#else
  return b - 64u * (noise >> (16 * HALF) & 0xffffu);
#endif
}

// a in [0, 6] -> as above, up if a is above the level below it by more than (n + 1/2) / 2^16 of a step, n being HALF of
// `noise`; the sign is that of `sign`. Below 1 the step is that of [1, 2), so 1 is added there: a step is then always
// the upper half of a mantissa, whose lower 22 bits are compared with 2^6 n + 32 by an addition that carries: of 2^22 -
// 33 - 2^6 n. Rounding a + 1 up keeps that comparison exact: what is lost lay below an integer that it is above.
template <int HALF>
__host__ __device__ __forceinline__ uint32_t e2m1_stochastic_integer(float a, float sign, uint32_t noise,
                                                                     float& level) {
  const float one = a < 1.0f ? 1.0f : 0.0f;
  // and 4 to the index of [1, 1.5)
  const uint32_t word = (less_noise<HALF>(bits(add_up(a, one)), noise) + bits(one) + 0x013fffdfu) << 6;
  level = e2m1_value(word & 0x70000000u);
  return with_sign(word, sign);
}

// Non-negative fp32 -> E4M3: nearest even, saturating at 448, NaN -> 0x7f.
__host__ __device__ __forceinline__ uint32_t e4m3_nearest_integer(float x) {
  const uint32_t b = bits(x > 448.0f ? 448.0f : x);
  const uint32_t normal = ((b + 0x7ffffu + ((b >> 20) & 1u)) >> 20) - (120u << 3);
  const uint32_t subnormal = bits((x > 0.015625f ? 0.015625f : x) * 512.0f + 8388608.0f) & 0xffu;
  return x != x ? 0x7fu : (x < 0.015625f ? subnormal : normal);
}

// ---- what kernels call: eight elements of a row at a time -----------------------------------------------------------

// u[0..8), none of them NaN -> the word of their eight codes, the first one lowest; the levels of their magnitudes.
__host__ __device__ __forceinline__ uint32_t e2m1x8_nearest(const float* u, float* level) {
#ifdef FP4DIST_E2M1_HARDWARE
  uint32_t word;
  asm("{\n\t.reg .b8 b0, b1, b2, b3;\n\t"
      "cvt.rn.satfinite.e2m1x2.f32 b0, %2, %1;\n\t"
      "cvt.rn.satfinite.e2m1x2.f32 b1, %4, %3;\n\t"
      "cvt.rn.satfinite.e2m1x2.f32 b2, %6, %5;\n\t"
      "cvt.rn.satfinite.e2m1x2.f32 b3, %8, %7;\n\t"
      "mov.b32 %0, {b0, b1, b2, b3};\n\t}"
      : "=r"(word)
      : "f"(u[0]), "f"(u[1]), "f"(u[2]), "f"(u[3]), "f"(u[4]), "f"(u[5]), "f"(u[6]), "f"(u[7]));
#pragma unroll
  for (int i = 0; i < 8; ++i) level[i] = e2m1_value((word << (28 - 4 * i)) & 0x70000000u);
  return word;
#else
  uint32_t word = 0;
#pragma unroll
  for (int i = 7; i >= 0; --i) word = with_code(word, e2m1_nearest_integer(u[i], level[i]));
  return word;
#endif
}

// The same with noise: a threshold rule that no conversion instruction has, so all architectures compute it alike.
// noise: four words, the 16-bit half number i of them is that of element i. a: magnitudes of at most 6, none NaN.
__host__ __device__ __forceinline__ uint32_t e2m1x8_stochastic(const float* a, const float* signs,
                                                               const uint32_t* noise, float* level) {
  uint32_t word = 0;
#pragma unroll
  for (int i = 6; i >= 0; i -= 2) {
    word = with_code(word, e2m1_stochastic_integer<1>(a[i + 1], signs[i + 1], noise[i / 2], level[i + 1]));
    word = with_code(word, e2m1_stochastic_integer<0>(a[i], signs[i], noise[i / 2], level[i]));
  }
  return word;
}

__host__ __device__ __forceinline__ uint32_t e4m3_nearest(float x) {
#ifdef FP4DIST_E4M3_HARDWARE
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
  return pair & 0x7fu;
#else
  return e4m3_nearest_integer(x);
#endif
}

// ---- one form everywhere: once a block, or exact ------------------------------------------------------------------

// Non-negative fp32 -> E4M3, up with the probability of the distance from the value below; noise: 32 bits.
__host__ __device__ __forceinline__ uint32_t e4m3_stochastic(float x, uint32_t noise) {
  const float clamped = x > 448.0f ? 448.0f : x;
  const uint32_t b = bits(clamped);
  const float steps = (clamped > 0.015625f ? 0.015625f : clamped) * 512.0f;
  const bool normal = x >= 0.015625f;
  const float floor = static_cast<float>(static_cast<int>(steps));
  const uint32_t code = normal ? (b >> 20) - (120u << 3) : static_cast<uint32_t>(static_cast<int>(floor));
  const float distance = normal ? static_cast<float>(b & 0xfffffu) * 9.5367431640625e-07f : steps - floor;
  const float threshold = (static_cast<float>(noise >> 9) * 2.0f + 1.0f) * 5.9604644775390625e-08f;
  return x != x ? 0x7fu : code + (distance > threshold ? 1u : 0u);
}

// E4M3 code below 128 -> fp32.
__host__ __device__ __forceinline__ float e4m3_value(uint32_t code) {
  const float value = floats(code << 20) * 1.329227995784916e36f;  // as e2m1_value: 2^120 too small
  return code == 0x7fu ? not_a_number() : value;
}

// E8M0 byte -> fp32.
__host__ __device__ __forceinline__ float e8m0_value(uint32_t byte) {
  return byte == 255u ? not_a_number() : floats(byte == 0u ? 0x00400000u : byte << 23);
}

// E8M0 byte -> 1 / its value, exact.
__host__ __device__ __forceinline__ float e8m0_reciprocal(uint32_t byte) {
  return byte == 255u ? not_a_number() : floats(byte == 254u ? 0x00400000u : (254u - byte) << 23);
}

// Two fp32 that bf16 holds exactly -> their word, the first one lowest.
__host__ __device__ __forceinline__ uint32_t bf16x2_exact(float first, float second) {
  return (bits(first) >> 16) | (bits(second) & 0xffff0000u);
}

// ---- codes by the word: what GEMMs without FP4 tensor cores multiply -----------------------------------------------

// The bytes of `low` (0 to 3) and `high` (4 to 7) that the four low nibbles of `selector`, each below 8, name.
__host__ __device__ __forceinline__ uint32_t bytes_of(uint32_t low, uint32_t high, uint32_t selector) {
#ifdef __CUDA_ARCH__
  return __byte_perm(low, high, selector);
#else
  uint32_t found = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t which = selector >> (4 * i) & 7u, byte = (which < 4 ? low : high) >> (8 * (which % 4)) & 0xffu;
    found |= byte << (8 * i);
  }
  return found;
#endif
}

// Two bf16 times two bf16, products that bf16 holds exactly; -0 stays.
__host__ __device__ __forceinline__ uint32_t bf16x2_times(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint32_t found;  // plus -0: sm_80 has no product alone
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(found) : "r"(a), "r"(b), "r"(0x80008000u));
  return found;
#else
  return bf16x2_exact(floats(a << 16) * floats(b << 16), floats(a & 0xffff0000u) * floats(b & 0xffff0000u));
#endif
}

// The codes in the upper four bits of both halves of `top`, times the scales in `twice`, as two bf16.
__host__ __device__ __forceinline__ uint32_t bf16x2_of_codes(uint32_t top, uint32_t twice) {
  // exponent and mantissa where bf16 has them, 2^126 too small
  const uint32_t small = ((top >> 6) & 0x01c001c0u) | (top & 0x80008000u);
  return bf16x2_times(bf16x2_times(small, 0x7e807e80u), twice);
}

// Eight codes -> code * scale as bf16, number i and number i + 4 in a word. scale: bf16 holds it.
__host__ __device__ __forceinline__ void bf16x2_pairs(uint32_t word, float scale, uint32_t* pair) {
  const uint32_t twice = bf16x2_exact(scale, scale);
#pragma unroll
  for (int i = 0; i < 4; ++i) pair[i] = bf16x2_of_codes(word << (12 - 4 * i), twice);
}

// The same in order.
__host__ __device__ __forceinline__ void bf16x8_values(uint32_t word, float scale, uint32_t* out) {
  uint32_t pair[4];
  bf16x2_pairs(word, scale, pair);
  out[0] = bytes_of(pair[0], pair[1], 0x5410u);
  out[1] = bytes_of(pair[2], pair[3], 0x5410u);
  out[2] = bytes_of(pair[0], pair[1], 0x7632u);
  out[3] = bytes_of(pair[2], pair[3], 0x7632u);
}

// FP8 types by the bits of their mantissa (2: E5M2, 3: E4M3). highest: the exponent at which 6 is the largest value of
// E2M1's that is held;  lowest: the last at which all of them are.
template <int MANTISSA>
struct Fp8 {
  static constexpr int bias = MANTISSA == 2 ? 15 : 7, highest = MANTISSA == 2 ? 13 : 6, lowest = 2 - bias - MANTISSA;
};

struct Levels {
  uint32_t low, high;
};

// The FP8 bytes of E2M1's eight levels times 2^exponent, cut towards 0.
template <int MANTISSA>
__host__ __device__ __forceinline__ Levels fp8_levels(int exponent) {
  using F = Fp8<MANTISSA>;
  if (exponent >= 2 - F::bias) {
    const auto one = static_cast<uint32_t>(exponent + F::bias) << MANTISSA;  // the byte of 1.0
    constexpr uint32_t kStep = 1u << (MANTISSA - 1);                         // from 1.0 to 1.5
    return {one * 0x01010100u + (kStep << 24) - (kStep << 9), one * 0x01010101u + kStep * 0x05040302u};
  }
  // as fp32 2^(127 - bias) too small, exponent and mantissa are where fp32 has them, subnormal numbers included
  const int least = F::lowest - 4;  // below, nothing is left
  const float factor = floats(static_cast<uint32_t>((exponent < least ? least : exponent) + 126 + F::bias) << 23);
  Levels found{0, 0};
#pragma unroll
  for (uint32_t i = 1; i < 8; ++i) {
    const uint32_t byte = (bits(floats(i << 22) * factor) >> (23 - MANTISSA)) & 0x7fu;
    (i < 4 ? found.low : found.high) |= byte << (8 * (i % 4));
  }
  return found;
}

// Eight codes -> two words of four FP8.
__host__ __device__ __forceinline__ void fp8x8_values(uint32_t word, const Levels& levels, uint32_t* out) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t four = word >> (16 * i);
    out[i] = bytes_of(levels.low, levels.high, four & 0x7777u) | bytes_of(0u, 0x80808080u, (four >> 1) & 0x4444u);
  }
}

// A binary float with subnormal numbers: MANTISSA bits, exponents REBIAS below those of fp32.
// Non-negative fp32 -> its code: nearest even, saturating at `largest`; NaN -> nan.
template <int MANTISSA, int REBIAS>
__host__ __device__ __forceinline__ uint32_t float_nearest(float x, float largest, uint32_t nan) {
  constexpr int kDrop = 23 - MANTISSA;
  const float smallest_normal = floats(static_cast<uint32_t>(REBIAS + 1) << 23);
  const float steps_in_one = floats(static_cast<uint32_t>(253 + MANTISSA - REBIAS) << 23);
  const uint32_t b = bits(below(x, largest));
  const uint32_t normal = ((b + ((1u << (kDrop - 1)) - 1) + ((b >> kDrop) & 1u)) >> kDrop) -
                          (static_cast<uint32_t>(REBIAS) << MANTISSA);
  const uint32_t subnormal = bits(below(x, smallest_normal) * steps_in_one + 8388608.0f) & 0xffu;
  return x != x ? nan : (x < smallest_normal ? subnormal : normal);
}

// Four fp32 that the FP8 type holds, or numbers next to them, -> their word, the first one lowest.
template <int MANTISSA>
__host__ __device__ __forceinline__ uint32_t fp8x4_nearest(const float* v) {
#ifdef FP4DIST_E4M3_HARDWARE  // E5M2 came with it
  uint32_t word;
  if constexpr (MANTISSA == 2) {
    asm("{\n\t.reg .b16 a, b;\n\tcvt.rn.satfinite.e5m2x2.f32 a, %2, %1;\n\t"
        "cvt.rn.satfinite.e5m2x2.f32 b, %4, %3;\n\tmov.b32 %0, {a, b};\n\t}"
        : "=r"(word)
        : "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]));
  } else {
    asm("{\n\t.reg .b16 a, b;\n\tcvt.rn.satfinite.e4m3x2.f32 a, %2, %1;\n\t"
        "cvt.rn.satfinite.e4m3x2.f32 b, %4, %3;\n\tmov.b32 %0, {a, b};\n\t}"
        : "=r"(word)
        : "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]));
  }
  return word;
#else
  constexpr float kLargest = MANTISSA == 2 ? 57344.0f : 448.0f;
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float a = fabsf(v[i]);
    const uint32_t code = float_nearest<MANTISSA, MANTISSA == 2 ? 112 : 120>(a, kLargest, 0x7fu);
    word |= (code | bits(v[i]) >> 31 << 7) << (8 * i);
  }
  return word;
#endif
}

// Two fp32 -> the word of two bf16, the first one lowest: nearest even; a NaN stays one.
__host__ __device__ __forceinline__ uint32_t bf16x2_nearest(float first, float second) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
#else
  uint32_t b[2] = {bits(first), bits(second)};
  for (uint32_t& x : b) x = (x & 0x7fffffffu) > kInfinity ? 0x7fc00000u : x + 0x7fffu + ((x >> 16) & 1u);
  return (b[0] >> 16) | (b[1] & 0xffff0000u);
#endif
}

#ifdef FP4DIST_E2M1_STOCHASTIC_HARDWARE
// The machine's own stochastic rounding: eight random bits an element, in the order that PTX gives them. Its codes are
// not those of e2m1x8_stochastic, so no kernel calls it under that name; kept for a rounding of its own.
__device__ __forceinline__ uint32_t e2m1x4_stochastic_hardware(float a, float b, float c, float d, uint32_t noise) {
  uint16_t word;
  asm("cvt.rs.satfinite.e2m1x4.f32 %0, {%4, %3, %2, %1}, %5;"
      : "=h"(word)
      : "f"(a), "f"(b), "f"(c), "f"(d), "r"(noise));
  return word;
}
#endif

}  // namespace fp4dist
