// fp16 -> fp32, for a machine without CUDA: see emulator.h.
#pragma once

#include <cstdint>

#include "emulator.h"

inline uint16_t __ushort_as_half(uint16_t x) { return x; }

inline float __half2float(uint16_t half) {
  _Float16 x;
  __builtin_memcpy(&x, &half, 2);
  return static_cast<float>(x);
}
