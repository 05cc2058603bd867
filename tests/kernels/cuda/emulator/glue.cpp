// The entry points of csrc/ as C functions, for ctypes: what bindings.cpp is for torch, without its checks.
#include "convert.cuh"
#include "amax.h"
#include "decode.h"
#include "jobs.h"

using fp4dist::JobPointers;

extern "C" {

int emulated_quantize(const JobPointers* pointers, const int64_t* how, const double* factors) {
  return fp4dist::launch_quantize(fp4dist::job_of(*pointers, how, factors), nullptr);
}

int emulated_quantize_pair(const JobPointers* row, const int64_t* how, const double* factors, const JobPointers* column,
                           const int64_t* how_t, const double* factors_t) {
  const auto a = fp4dist::job_of(*row, how, factors), b = fp4dist::job_of(*column, how_t, factors_t);
  return fp4dist::launch_quantize_pair(a, b, nullptr);
}

int emulated_eden_scales(const float* corrected, const uint32_t* largest, const uint32_t* codes, const void* when,
                         int64_t number, int64_t columns, double budget, int swizzled, const int64_t* place,
                         uint8_t* scales, uint32_t* values, float* global_scale) {
  const fp4dist::EdenScales job{corrected,
                                largest,
                                codes,
                                number,
                                static_cast<int32_t>(columns),
                                static_cast<float>(budget),
                                fp4dist::place_of(place, place + 5, when),
                                scales,
                                values,
                                global_scale,
                                swizzled};
  return fp4dist::launch_eden_scales(job, nullptr);
}

int emulated_decode(const uint8_t* codes, const uint8_t* scales, const float* global_scale, int e8m0, int rows,
                    int cols, int block_rows, int block_cols, int to, int turned, double factor, const uint32_t* top,
                    void* values, float* scale, uint32_t* lost, uint32_t* memory) {
  const fp4dist::Decode job{{codes, scales, global_scale, e8m0, rows, cols, block_rows, block_cols},
                            to,
                            turned,
                            static_cast<float>(factor),
                            top,
                            values,
                            scale,
                            lost,
                            memory};
  return fp4dist::launch_decode(job, nullptr);
}

int emulated_largest_byte(const uint8_t* scales, int64_t number, uint32_t* top) {
  return fp4dist::launch_largest_byte(scales, number, top, nullptr);
}

int emulated_swizzle(const uint8_t* scales, int rows, int cols, int repeat, uint8_t* out) {
  return fp4dist::launch_swizzle(scales, rows, cols, repeat, out, nullptr);
}

int emulated_amax(const void* x, int64_t numel, int type, float* out) {
  return fp4dist::launch_amax(x, numel, static_cast<fp4dist::FloatType>(type), out, nullptr);
}

// n values each, through the functions of convert.cuh.
void convert_e2m1_nearest(const float* u, int64_t n, uint32_t* words, float* levels) {
  for (int64_t i = 0; i < n; i += 8) words[i / 8] = fp4dist::e2m1x8_nearest(u + i, levels + i);
}

void convert_e2m1_stochastic(const float* u, const uint32_t* noise, int64_t n, uint32_t* words, float* levels) {
  float a[8];
  for (int64_t i = 0; i < n; i += 8) {
    for (int j = 0; j < 8; ++j) a[j] = std::fabs(u[i + j]);
    words[i / 8] = fp4dist::e2m1x8_stochastic(a, u + i, noise + i / 2, levels + i);
  }
}

void convert_e4m3_nearest(const float* x, int64_t n, uint8_t* codes) {
  for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(fp4dist::e4m3_nearest(x[i]));
}

void convert_e4m3_stochastic(const float* x, const uint32_t* noise, int64_t n, uint8_t* codes) {
  for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(fp4dist::e4m3_stochastic(x[i], noise[i]));
}

void convert_values(float* e2m1, float* e4m3, float* e8m0, float* reciprocals) {
  for (uint32_t code = 0; code < 16; ++code) e2m1[code] = fp4dist::e2m1_value(code << 28);
  for (uint32_t code = 0; code < 128; ++code) e4m3[code] = fp4dist::e4m3_value(code);
  for (uint32_t byte = 0; byte < 256; ++byte) e8m0[byte] = fp4dist::e8m0_value(byte);
  for (uint32_t byte = 0; byte < 256; ++byte) reciprocals[byte] = fp4dist::e8m0_reciprocal(byte);
}

}  // extern "C"
