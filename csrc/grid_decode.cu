// Codes of any grid -> their values. See grid.h.
#include "portable.cuh"
#include "formats.cuh"
#include "strips.cuh"

namespace fp4dist {
namespace {

constexpr int kDecodeThreads = 256;
constexpr int kPer = 8;  // columns of a thread

// The byte of an FP8 value that holds `value` exactly.
__device__ __forceinline__ uint32_t fp8_byte(float value, int mantissa) {
  return fp8_nearest(fabsf(value), mantissa) | (bits(value) >> 24 & 0x80u);
}

__device__ __forceinline__ void store_values(const GridDecode& job, int64_t at, const float* value, int number) {
  const bool whole = number == kPer && at % kPer == 0;
  if (job.to == kValueFloat) {
    auto* to = static_cast<float*>(job.values) + at;
    if (whole) {
      reinterpret_cast<float4*>(to)[0] = {value[0], value[1], value[2], value[3]};
      reinterpret_cast<float4*>(to)[1] = {value[4], value[5], value[6], value[7]};
      return;
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (i < number) to[i] = value[i];
    }
  } else if (job.to == kValueBFloat16) {
    auto* to = static_cast<uint16_t*>(job.values) + at;
    if (whole) {
      *reinterpret_cast<uint4*>(to) = {bf16x2_exact(value[0], value[1]), bf16x2_exact(value[2], value[3]),
                                       bf16x2_exact(value[4], value[5]), bf16x2_exact(value[6], value[7])};
      return;
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (i < number) to[i] = static_cast<uint16_t>(bits(value[i]) >> 16);
    }
  } else {
    auto* to = static_cast<uint8_t*>(job.values) + at;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (i < number) to[i] = static_cast<uint8_t>(fp8_byte(value[i], job.to == kValueE4M3 ? 3 : 2));
    }
  }
}

__global__ void __launch_bounds__(kDecodeThreads) grid_decode_kernel(const __grid_constant__ GridDecode job) {
  __shared__ float levels[kLevels];
#pragma unroll
  for (int i = 0; i < kLevels; ++i) {
    if (threadIdx.x == static_cast<unsigned>(i)) levels[i] = job.levels[i];
  }
  __syncthreads();
  const int strips = (job.cols + kPer - 1) / kPer;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kDecodeThreads + threadIdx.x;
  if (i >= static_cast<int64_t>(job.rows) * strips) return;
  const int row = static_cast<int>(i / strips), col = static_cast<int>(i % strips) * kPer;
  const int number = job.cols - col < kPer ? job.cols - col : kPer;
  const uint8_t* codes = job.codes + row * job.code_stride + (job.packed ? col / 2 : col);
  const int64_t scale_row = static_cast<int64_t>(row / job.block_rows) * (job.cols / job.block_cols);
  const int64_t factor_row = static_cast<int64_t>(row / job.factor_rows) * (job.cols / job.factor_cols);
  const bool one_scale = job.block_cols % kPer == 0, one_factor = job.factor_cols % kPer == 0;
  float value[kPer], scale = 1.0f, factor = 1.0f;
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    value[j] = 0.0f;
    if (j >= number) continue;
    const uint32_t code = job.packed ? (codes[j / 2] >> (4 * (j % 2))) & 15u : codes[j];
    const uint32_t index = code & (job.sign - 1);
    const float level = job.mantissa ? fp8_value(index, job.mantissa) : levels[index % kLevels];
    value[j] = floats(bits(level) | (code & job.sign ? kSign : 0u));
    if (job.scaled) {
      if (j == 0 || !one_scale) scale = stored_scale(job.scales, scale_row + (col + j) / job.block_cols, job.scale);
      value[j] = value[j] * scale;
    }
    if (job.to == kValueFloat) {
      if (j == 0 || !one_factor) factor = job.factors[factor_row + (col + j) / job.factor_cols];
      value[j] = value[j] * factor;
    }
  }
  store_values(job, static_cast<int64_t>(row) * job.cols + col, value, number);
}

}  // namespace

cudaError_t launch_grid_decode(const GridDecode& job, cudaStream_t stream) {
  const int64_t threads = static_cast<int64_t>(job.rows) * ((job.cols + kPer - 1) / kPer);
  const auto blocks = static_cast<unsigned>((threads + kDecodeThreads - 1) / kDecodeThreads);
  FP4DIST_LAUNCH(grid_decode_kernel, blocks, kDecodeThreads, 0, stream, job);
  return cudaGetLastError();
}

GridDecode grid_decode_of(const void* codes, const void* scales, const void* factors, const int64_t* n,
                          const double* levels, void* values) {
  GridDecode job{};
  job.codes = static_cast<const uint8_t*>(codes);
  job.scales = scales;
  job.factors = static_cast<const float*>(factors);
  job.values = values;
  job.code_stride = n[0];
  int32_t* const settings[] = {&job.rows,        &job.cols,  &job.block_rows, &job.block_cols, &job.factor_rows,
                               &job.factor_cols, &job.scale, &job.scaled,     &job.to,         &job.mantissa,
                               &job.packed};
  for (int i = 0; i < 11; ++i) *settings[i] = static_cast<int32_t>(n[1 + i]);
  job.sign = static_cast<uint32_t>(n[12]);
  for (int i = 0; i < kLevels; ++i) job.levels[i] = static_cast<float>(levels[i]);
  return job;
}

}  // namespace fp4dist
