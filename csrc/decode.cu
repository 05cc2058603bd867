// Codes -> values: fp32, or what a GEMM without FP4 tensor cores multiplies; scales -> the layout of those that have
// them.
#include "decode.h"

#include "convert.cuh"
#include "scales.cuh"

namespace fp4dist {
namespace {

constexpr int kThreads = 256;

// FP8 formats: the exponent at which 6 is the largest value held; one below which fp32 would drop what is to be
// counted; bits of fp32's mantissa beyond the type's; by how much 127 - bias is below the 126 of E2M1's place in fp32.
template <int TO>
struct Fp8 {
  static constexpr int kHighest = TO == kToE5M2 ? 13 : 6;
  static constexpr int kLowest = TO == kToE5M2 ? -36 : -28;
  static constexpr int kDrop = TO == kToE5M2 ? 21 : 20;
  static constexpr int kSmaller = TO == kToE5M2 ? 14 : 6;
};

// A code in the top four bits and its scale's byte -> FP8, cut towards 0; `dropped` counts what this changes.
template <int TO>
__device__ __forceinline__ uint32_t fp8_of(uint32_t nibble, int byte, int largest, uint32_t& dropped) {
  using F = Fp8<TO>;
  if (byte == 255) return 0x7fu;
  const int wanted = byte - largest + F::kHighest, exponent = wanted < F::kLowest ? F::kLowest : wanted;
  const float small = floats(((nibble >> 6) & 0x01c00000u) | (nibble & kSign));
  const uint32_t found = bits(small * floats(static_cast<uint32_t>(exponent + 127 + F::kSmaller) << 23));
  dropped += (found & ((1u << F::kDrop) - 1)) != 0;
  return ((found >> F::kDrop) & 0x7fu) | ((found >> 24) & 0x80u);
}

// Eight codes under one scale, or (turned) each under its own -> a thread's part of the output.
template <int TO>
__device__ __forceinline__ void store_eight(const Decode& job, const uint32_t* nibble, const uint32_t* byte, int64_t to,
                                            float factor, int largest, uint32_t& dropped) {
  if constexpr (TO == kToE5M2 || TO == kToE4M3) {
    uint32_t words[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      words[i / 4] |= fp8_of<TO>(nibble[i], static_cast<int>(byte[i]), largest, dropped) << (8 * (i % 4));
    }
    reinterpret_cast<uint2*>(job.values)[to / 8] = {words[0], words[1]};
  } else {
    float value[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      value[i] = e2m1_value(nibble[i]) * (job.from.e8m0 ? e8m0_value(byte[i]) : e4m3_value(byte[i]));
    }
    if constexpr (TO == kToFloat) {
      auto* out = reinterpret_cast<float4*>(job.values) + to / 4;
      out[0] = {value[0] * factor, value[1] * factor, value[2] * factor, value[3] * factor};
      out[1] = {value[4] * factor, value[5] * factor, value[6] * factor, value[7] * factor};
    } else {
      reinterpret_cast<uint4*>(job.values)[to / 8] = {
          bf16x2_exact(value[0], value[1]), bf16x2_exact(value[2], value[3]), bf16x2_exact(value[4], value[5]),
          bf16x2_exact(value[6], value[7])};
    }
  }
}

template <int TO, bool TURNED>
__global__ void __launch_bounds__(kThreads) decode_kernel(const __grid_constant__ Decode job) {
  const Codes& q = job.from;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  float factor = 1.0f;
  int largest = 0;
  if constexpr (TO == kToFloat) factor = *q.global_scale * job.factor;
  if constexpr (TO == kToE5M2 || TO == kToE4M3) {
    largest = static_cast<int>(*job.top);
    if (i == 0) {
      const float shift = floats(static_cast<uint32_t>(127 - Fp8<TO>::kHighest) << 23);
      *job.scale = *q.global_scale * (e8m0_value(static_cast<uint32_t>(largest)) * shift);
    }
  }
  const int per_row = q.cols / q.block_cols;
  uint32_t dropped = 0;
  uint32_t nibble[8], byte[8];
  if constexpr (!TURNED) {
    if (i < static_cast<int64_t>(q.rows) * (q.cols / 8)) {
      const int row = static_cast<int>(i / (q.cols / 8)), col = static_cast<int>(i % (q.cols / 8)) * 8;
      const uint32_t word = __ldg(reinterpret_cast<const uint32_t*>(q.codes) + i);
      const uint32_t scale = q.scales[static_cast<int64_t>(row / q.block_rows) * per_row + col / q.block_cols];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        nibble[j] = word << (28 - 4 * j);
        byte[j] = scale;
      }
      store_eight<TO>(job, nibble, byte, i * 8, factor, largest, dropped);
    }
  } else {
    // four threads side by side along the rows of memory, eight along its bytes
    const int64_t tile = i / 32;
    const int lane = static_cast<int>(i % 32), down = (q.rows + 31) / 32;
    const int row = static_cast<int>(tile % down) * 32 + lane % 4 * 8;
    const int col = static_cast<int>(tile / down) * 16 + lane / 4 * 2;
    if (row < q.rows && col < q.cols) {
      uint32_t pair[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        pair[j] = q.codes[static_cast<int64_t>(row + j) * (q.cols / 2) + col / 2];
        byte[j] = q.scales[static_cast<int64_t>((row + j) / q.block_rows) * per_row + col / q.block_cols];
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int j = 0; j < 8; ++j) nibble[j] = pair[j] << (28 - 4 * k);
        store_eight<TO>(job, nibble, byte, static_cast<int64_t>(col + k) * q.rows + row, factor, largest, dropped);
      }
    }
  }
  if constexpr (TO == kToE5M2 || TO == kToE4M3) {
    dropped = __reduce_add_sync(0xffffffffu, dropped);
    if (dropped != 0 && threadIdx.x % 32 == 0) atomicAdd(job.lost, dropped);
  }
}

__global__ void __launch_bounds__(kThreads) largest_byte_kernel(const uint8_t* scales, int64_t number, uint32_t* top) {
  uint32_t found = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < number;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const uint32_t byte = scales[i];
    if (byte != 255u && byte > found) found = byte;
  }
  found = __reduce_max_sync(0xffffffffu, found);
  if (threadIdx.x % 32 == 0 && found != 0) atomicMax(top, found);
}

__global__ void __launch_bounds__(kThreads)
    swizzle_kernel(const uint8_t* scales, int rows, int cols, int repeat, uint8_t* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int wide = (cols + 3) / 4 * 4;
  const int64_t tall = (static_cast<int64_t>(rows) * repeat + 127) / 128 * 128;
  if (i >= tall * wide) return;
  const int64_t row = i / wide;
  const int col = static_cast<int>(i % wide);
  const bool inside = row < static_cast<int64_t>(rows) * repeat && col < cols;
  out[scale_at(row, col, cols, true)] = inside ? scales[row / repeat * cols + col] : uint8_t{0};
}

template <int TO>
cudaError_t launch_to(const Decode& job, cudaStream_t stream) {
  const int64_t threads = job.turned
                              ? static_cast<int64_t>((job.from.rows + 31) / 32) * ((job.from.cols + 15) / 16) * 32
                              : static_cast<int64_t>(job.from.rows) * (job.from.cols / 8);
  const auto blocks = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
  const auto kernel = job.turned ? &decode_kernel<TO, true> : &decode_kernel<TO, false>;
  FP4DIST_LAUNCH(kernel, blocks, kThreads, 0, stream, job);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_decode(const Decode& job, cudaStream_t stream) {
  switch (job.to) {
    case kToFloat:
      return launch_to<kToFloat>(job, stream);
    case kToBFloat16:
      return launch_to<kToBFloat16>(job, stream);
    case kToE5M2:
      return launch_to<kToE5M2>(job, stream);
    case kToE4M3:
      return launch_to<kToE4M3>(job, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t launch_largest_byte(const uint8_t* scales, int64_t number, uint32_t* top, cudaStream_t stream) {
  const int64_t wanted = (number + kThreads * 16 - 1) / (kThreads * 16);
  FP4DIST_LAUNCH(largest_byte_kernel, static_cast<unsigned>(wanted < 1024 ? wanted : 1024), kThreads, 0, stream, scales,
                 number, top);
  return cudaGetLastError();
}

cudaError_t launch_swizzle(const uint8_t* scales, int32_t rows, int32_t cols, int32_t repeat, uint8_t* out,
                           cudaStream_t stream) {
  const int64_t number = (static_cast<int64_t>(rows) * repeat + 127) / 128 * 128 * ((cols + 3) / 4 * 4);
  const auto blocks = static_cast<unsigned>((number + kThreads - 1) / kThreads);
  FP4DIST_LAUNCH(swizzle_kernel, blocks, kThreads, 0, stream, scales, rows, cols, repeat, out);
  return cudaGetLastError();
}

}  // namespace fp4dist
