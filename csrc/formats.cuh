// Conversions between fp32 and the formats of research, by integer arithmetic everywhere; see convert.cuh.
#pragma once

#include "convert.cuh"

namespace fp4dist {

// The code of a magnitude -> its value.
template <int MANTISSA, int REBIAS>
__host__ __device__ __forceinline__ float float_value(uint32_t code) {
  return floats(code << (23 - MANTISSA)) * floats(static_cast<uint32_t>(127 + REBIAS) << 23);
}

// UE5M3 scales: 61440 is code 0xf7, NaN 0xff.
__host__ __device__ __forceinline__ uint32_t ue5m3_nearest(float x) {
  return float_nearest<3, 112>(x, 61440.0f, 0xffu);
}

__host__ __device__ __forceinline__ float ue5m3_value(uint32_t code) {
  return code == 0xffu ? not_a_number() : float_value<3, 112>(code);
}

// FP8 elements, by the bits of their mantissa (3: E4M3, 2: E5M2): magnitude -> index of its level; NaN -> the largest.
__host__ __device__ __forceinline__ uint32_t fp8_nearest(float x, int mantissa) {
  return mantissa == 3 ? float_nearest<3, 120>(x, 448.0f, 126u) : float_nearest<2, 112>(x, 57344.0f, 123u);
}

__host__ __device__ __forceinline__ float fp8_value(uint32_t index, int mantissa) {
  return mantissa == 3 ? float_value<3, 120>(index) : float_value<2, 112>(index);
}

}  // namespace fp4dist
