// The entry points of parts.h as C functions, for ctypes; see glue.cpp. The arguments are those of bindings_parts.cpp.
#include <algorithm>

#include "parts.h"

extern "C" {

int emulated_take_channels(const void* x, int64_t stride, int wide, int turned, int rows, int cols,
                           const uint8_t* chosen, int by_row, int mx, void* rest, void* side) {
  return fp4dist::launch_take({x, stride, wide, turned, rows, cols, chosen, by_row, mx, rest, side}, nullptr);
}

int emulated_hot_residual(const void* x, int64_t stride, int wide, const void* codes, const uint8_t* scales,
                          const float* outer, const uint8_t* chosen, int rows, int cols, int block_rows, int block_cols,
                          int e8m0, void* side) {
  return fp4dist::launch_residual({{x, stride, wide}, codes, scales, outer, chosen, rows, cols, block_rows, block_cols,
                                   e8m0 ? fp4dist::kE8M0 : fp4dist::kE4M3, side},
                                  nullptr);
}

int emulated_clamp_rows(const uint16_t* x, int64_t stride, int rows, int cols, int wanted, uint16_t* rest,
                        uint16_t* side) {
  return fp4dist::launch_clamp({x, stride, rows, cols, wanted, rest, side}, nullptr);
}

int emulated_take_largest(const uint16_t* x, int64_t stride, int rows, int cols, int group, int k, uint16_t* rest,
                          uint16_t* side) {
  return fp4dist::launch_largest({x, stride, rows, cols, group, k, rest, side}, nullptr);
}

int emulated_slope_offsets(const float* u, int64_t count, const double* levels, int number, double* out) {
  fp4dist::Offsets job{u, out, count, {}, number - 1};
  std::copy(levels, levels + number, job.levels);
  return fp4dist::launch_offsets(job, nullptr);
}

int emulated_split_terms(const float* x, int64_t count, uint16_t* first, uint16_t* second, uint16_t* third) {
  return fp4dist::launch_terms({x, {first, second, third}, count}, nullptr);
}

}  // extern "C"
