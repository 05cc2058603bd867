// Codes -> values: fp32, or what a GEMM without FP4 tensor cores multiplies; scales -> the layout of those that have
// them.
#include "decode.h"

#include "convert.cuh"
#include "scales.cuh"

namespace fp4dist {
namespace {

constexpr int kThreads = 256;

constexpr int kEach = 4;  // words of eight codes that a thread reads before it stores any of them

template <int TO>
constexpr int kMantissa = TO == kToE5M2 ? 2 : 3;
template <int TO>
constexpr bool kNarrow = TO == kToE5M2 || TO == kToE4M3;

// What all values of a carrier share: a factor, or the scale byte at the top of an FP8 type; what that type has lost.
struct Common {
  float factor;
  int largest;
  uint32_t lost;
};

// How many of eight codes are no multiple of the smallest FP8 number at 2^exponent.
template <int MANTISSA>
__device__ __forceinline__ uint32_t fp8_lost(uint32_t word, int exponent) {
  const int below = Fp8<MANTISSA>::lowest - exponent;  // 1/2 is 2^-below of that number
  if (below <= 0) return 0;
  const uint32_t lost = below == 1 ? 0x0au : below == 2 ? 0x2eu : below == 3 ? 0xbeu : 0xfeu;  // by level
  uint32_t found = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) found += (lost >> ((word >> (4 * i)) & 7u)) & 1u;
  return found;
}

// Eight codes under the scale `byte` -> a thread's part of the output, from element `to` on.
template <int TO>
__device__ __forceinline__ void store_eight(const Decode& job, uint32_t word, uint32_t byte, uint64_t to,
                                            Common& common) {
  if constexpr (kNarrow<TO>) {
    constexpr int M = kMantissa<TO>;
    const int exponent = static_cast<int>(byte) - common.largest + Fp8<M>::highest;
    const bool nothing = byte == 255u;  // all codes of a NaN's block are its largest level
    const Levels levels = nothing ? Levels{0x7f7f7f7fu, 0x7f7f7f7fu} : fp8_levels<M>(exponent);
    if (!nothing) common.lost += fp8_lost<M>(word, exponent);
    uint32_t words[2];
    fp8x8_values(nothing ? kNanCodes : word, levels, words);
    reinterpret_cast<uint2*>(job.values)[to / 8] = {words[0], words[1]};
    return;
  }
  const float scale = job.from.e8m0 ? e8m0_value(byte) : e4m3_value(byte);
  if constexpr (TO == kToFloat) {
    float value[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] = e2m1_value(word << (28 - 4 * i)) * scale * common.factor;
    auto* out = reinterpret_cast<float4*>(job.values) + to / 4;
    out[0] = {value[0], value[1], value[2], value[3]};
    out[1] = {value[4], value[5], value[6], value[7]};
  } else {
    uint32_t words[4];
    bf16x8_values(word, scale, words);
    reinterpret_cast<uint4*>(job.values)[to / 8] = {words[0], words[1], words[2], words[3]};
  }
}

// Where a thread's words are: neighbours in a row, or below each other under one scale; and their scales.
struct Places {
  uint32_t word[kEach], scale[kEach];
  bool inside[kEach];

  __device__ __forceinline__ Places(const Codes& q, uint32_t block) {
    const uint32_t wide = static_cast<uint32_t>(q.cols) / 8, number = wide * static_cast<uint32_t>(q.rows);
    const uint32_t across = static_cast<uint32_t>(q.block_cols) / 8, down = static_cast<uint32_t>(q.block_rows);
    if (down % kEach == 0) {
      const uint32_t i = block * kThreads + threadIdx.x, strip = i / wide, column = i % wide;
      const uint32_t at = strip * kEach / down * (wide / across) + column / across;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        word[j] = (strip * kEach + j) * wide + column;
        scale[j] = at;
        inside[j] = i < number / kEach;
      }
      return;
    }
    const uint32_t first = block * (kThreads * kEach) + threadIdx.x;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      word[j] = first + j * kThreads;
      inside[j] = word[j] < number;
      if (down == 1 && (across & (across - 1)) == 0) {  // blocks follow each other as their elements do
        scale[j] = word[j] >> (31 - __clz(static_cast<int>(across)));
      } else {
        scale[j] = word[j] / wide / down * (wide / across) + word[j] % wide / across;
      }
    }
  }
};

// Part number `block` of codes as they lie.
template <int TO>
__device__ __forceinline__ void straight(const Decode& job, uint32_t block, Common& common) {
  const Codes& q = job.from;
  const Places at(q, block);
  uint32_t words[kEach] = {}, bytes[kEach] = {};
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    if (!at.inside[j]) continue;
    words[j] = __ldg(reinterpret_cast<const uint32_t*>(q.codes) + at.word[j]);
    bytes[j] = __ldg(q.scales + at.scale[j]);
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    if (at.inside[j]) store_eight<TO>(job, words[j], bytes[j], static_cast<uint64_t>(at.word[j]) * 8, common);
  }
}

// Transposes 8 x 8 codes: word r has row r before, column r afterwards.
__device__ __forceinline__ void transpose_codes(uint32_t (&words)[8]) {
  uint32_t even[4], odd[4];  // of two rows: byte number i has their codes of column 2 i, or 2 i + 1
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t a = words[2 * i], b = words[2 * i + 1];
    even[i] = (a & 0x0f0f0f0fu) | ((b << 4) & 0xf0f0f0f0u);
    odd[i] = ((a >> 4) & 0x0f0f0f0fu) | (b & 0xf0f0f0f0u);
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const uint32_t* rows = k == 0 ? even : odd;
    const uint32_t a = bytes_of(rows[0], rows[1], 0x5140u), b = bytes_of(rows[2], rows[3], 0x5140u);
    const uint32_t c = bytes_of(rows[0], rows[1], 0x7362u), d = bytes_of(rows[2], rows[3], 0x7362u);
    words[k] = bytes_of(a, b, 0x5410u);
    words[2 + k] = bytes_of(a, b, 0x7632u);
    words[4 + k] = bytes_of(c, d, 0x5410u);
    words[6 + k] = bytes_of(c, d, 0x7632u);
  }
}

// Part number `block` of the transpose: a thread has 8 x 8 codes, eight threads follow each other down the rows.
template <int TO>
__device__ __forceinline__ void turned(const Decode& job, uint32_t block, Common& common) {
  const Codes& q = job.from;
  const uint32_t rows = static_cast<uint32_t>(q.rows), cols = static_cast<uint32_t>(q.cols), down = (rows + 63) / 64;
  const uint32_t row = block % down * 64 + threadIdx.x % 8 * 8, col = block / down * 256 + threadIdx.x / 8 * 8;
  if (row >= rows || col >= cols) return;
  const uint32_t per_row = cols / static_cast<uint32_t>(q.block_cols);
  const uint32_t at = row / static_cast<uint32_t>(q.block_rows) * per_row + col / static_cast<uint32_t>(q.block_cols);
  const auto* from = reinterpret_cast<const uint32_t*>(q.codes) + (static_cast<uint64_t>(row) * (cols / 8) + col / 8);
  uint32_t words[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) words[j] = __ldg(from + j * (cols / 8));
  const uint32_t byte = __ldg(q.scales + at);
  transpose_codes(words);
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    store_eight<TO>(job, words[k], byte, static_cast<uint64_t>(col + k) * rows + row, common);
  }
}

// The factor of all FP8 values, where the scale byte `largest` is at the top of the type.
template <int TO>
__device__ __forceinline__ float fp8_factor(const Decode& job, int largest) {
  constexpr uint32_t kDown = 127 - Fp8<kMantissa<TO>>::highest;
  return *job.from.global_scale * (e8m0_value(static_cast<uint32_t>(largest)) * floats(kDown << 23));
}

__device__ __forceinline__ void count(uint32_t lost, uint32_t* to) {
  lost = __reduce_add_sync(0xffffffffu, lost);
  if (lost != 0 && threadIdx.x % 32 == 0) atomicAdd(to, lost);
}

template <int TO, bool TURNED>
__global__ void __launch_bounds__(kThreads) decode_kernel(const __grid_constant__ Decode job) {
  Common common{1.0f, 0, 0};
  if constexpr (TO == kToFloat) common.factor = *job.from.global_scale * job.factor;
  if constexpr (kNarrow<TO>) {
    common.largest = static_cast<int>(*job.top);
    if (blockIdx.x == 0 && threadIdx.x == 0) *job.scale = fp8_factor<TO>(job, common.largest);
  }
  if constexpr (TURNED) {
    turned<TO>(job, blockIdx.x, common);
  } else {
    straight<TO>(job, blockIdx.x, common);
  }
  if constexpr (kNarrow<TO>) count(common.lost, job.lost);
}

// Behind a quantizer that wrote FP8 itself (`Job.narrow`): all over again where the matrix did not fit, mostly nothing.
// Its memory for the next matrix.
template <int TO>
__global__ void __launch_bounds__(kThreads) again_kernel(const __grid_constant__ Decode job, uint32_t parts) {
  uint32_t* memory = job.memory;
  const uint32_t misfits = memory[kMisfits], before = memory[kLargestBefore] + kHeadroom;
  Common common{1.0f, static_cast<int>(misfits ? memory[kLargest] : before < 254u ? before : 254u), 0};
  if (blockIdx.x == 0 && threadIdx.x == 0) *job.scale = fp8_factor<TO>(job, common.largest);
  if (misfits) {
    for (uint32_t part = blockIdx.x; part < parts; part += gridDim.x) straight<TO>(job, part, common);
    count(common.lost, memory + kCounting);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();
  if (atomicAdd(memory + kArrived, 1u) != gridDim.x - 1) return;
  const uint32_t lost = atomicExch(memory + kCounting, 0u);  // of the last to arrive
  atomicExch(memory + kLargestBefore, atomicExch(memory + kLargest, 0u));
  memory[kMisfits] = 0;
  memory[kLost] = lost;
  memory[kArrived] = 0;
  if (job.lost != memory + kLost) atomicMax(job.lost, lost);
}

__global__ void __launch_bounds__(kThreads) largest_byte_kernel(const uint8_t* scales, int64_t number, uint32_t* top) {
  __shared__ uint32_t tops[kThreads / 32];
  uint32_t found = 0;
  const auto look = [&found](uint32_t byte) {
    if (byte != 255u && byte > found) found = byte;
  };
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t vectors = reinterpret_cast<uintptr_t>(scales) % 16 == 0 ? number / 16 : 0;
  for (int64_t i = first; i < vectors; i += stride) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(scales) + i);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 16; ++j) look(words[j / 4] >> (8 * (j % 4)) & 0xffu);
  }
  for (int64_t i = 16 * vectors + first; i < number; i += stride) look(scales[i]);
  found = __reduce_max_sync(0xffffffffu, found);
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = found;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  found = __reduce_max_sync(0xffffffffu, threadIdx.x < kThreads / 32 ? tops[threadIdx.x] : 0u);
  if (threadIdx.x == 0 && found != 0) atomicMax(top, found);
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

uint32_t parts_of(const Decode& job) {
  if (job.turned) return static_cast<uint32_t>((job.from.rows + 63) / 64) * ((job.from.cols + 255) / 256);
  constexpr int64_t kPart = kThreads * kEach;
  return static_cast<uint32_t>((static_cast<int64_t>(job.from.rows) * (job.from.cols / 8) + kPart - 1) / kPart);
}

template <int TO>
cudaError_t launch_to(const Decode& job, cudaStream_t stream) {
  if (static_cast<int64_t>(job.from.rows) * (job.from.cols / 8) > INT32_MAX) return cudaErrorInvalidValue;
  const uint32_t parts = parts_of(job);
  if constexpr (kNarrow<TO>) {
    if (job.memory) {
      FP4DIST_LAUNCH(again_kernel<TO>, parts < 264u ? parts : 264u, kThreads, 0, stream, job, parts);
      return cudaGetLastError();
    }
  }
  const auto kernel = job.turned ? &decode_kernel<TO, true> : &decode_kernel<TO, false>;
  FP4DIST_LAUNCH(kernel, parts, kThreads, 0, stream, job);
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
  FP4DIST_LAUNCH(largest_byte_kernel, static_cast<unsigned>(wanted < 512 ? wanted : 512), kThreads, 0, stream, scales,
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
