// The extremes of rows and of groups of a row, from one reading of a bf16 matrix. See parts.h.
#include "parts.h"

#include "portable.cuh"
#include "tile.cuh"

namespace fp4dist {
namespace {

constexpr int kExtremeThreads = 256, kOfThread = 32;  // elements of a row that a thread keeps
constexpr int kMostWarps = kLongestClamp / (32 * kOfThread);
constexpr int kUnordered = 0x7fff;  // NaN

// The bits of two bf16 as integers in the order of their values, -0 below 0, and back.
__device__ __forceinline__ uint32_t ordered(uint32_t pair) { return pair ^ ((pair >> 15 & 0x00010001u) * 0x7fffu); }

// Sum of both halves of `counts` over the threads that share a row; `shared` is another one in the next call.
__device__ __forceinline__ uint32_t of_row(uint32_t counts, int warps, uint32_t* shared) {
  counts = __reduce_add_sync(kWarp, counts);
  if (warps == 1) return counts;
  const int warp = static_cast<int>(threadIdx.x / 32);
  if (threadIdx.x % 32 == 0) shared[warp] = counts;
  __syncthreads();
  uint32_t total = 0;
  for (int i = warp / warps * warps; i < (warp / warps + 1) * warps; ++i) total += shared[i];
  return total;
}

// Eight elements of a row from column `col` on; NaN beyond its end.
__device__ __forceinline__ void read8(const Clamp& job, int row, int col, bool vectors, uint32_t (&words)[4]) {
  const uint16_t* from = job.x + row * job.stride + col;
  if (row < job.rows && vectors && col < job.cols) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(from));
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = row < job.rows && col + 2 * i < job.cols ? from[2 * i] : kUnordered;
    const uint32_t high = row < job.rows && col + 2 * i + 1 < job.cols ? from[2 * i + 1] : kUnordered;
    words[i] = low | high << 16;
  }
}

__device__ __forceinline__ void write8(uint16_t* to, int count, bool vectors, const uint32_t (&words)[4]) {
  if (vectors) {
    *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) to[i] = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
  }
}

struct Limits {
  int lower, upper;              // what is beyond them
  int lower_value, upper_value;  // becomes this
};

__device__ __forceinline__ uint32_t bf16_of(int key) {
  return static_cast<uint32_t>(key < 0 ? key ^ 0x7fff : key) & 0xffffu;
}

// The bits of an element between its limits; of Inf and NaN, which stay, too.
__device__ __forceinline__ uint32_t clamped(int key, const Limits& limits) {
  if (key >= 0x7f80 || key <= -0x7f81) return bf16_of(key);
  if (limits.upper == kUnordered) return 0x7fc0u;  // then as many are NaN for the lower one
  int kept = key > limits.upper ? limits.upper_value : key;
  kept = kept < limits.lower ? limits.lower_value : kept;
  return bf16_of(kept);
}

// A quantile by nearest rank is an element of the row: bisection finds it by 16 counts, for both ends at once.
__global__ void __launch_bounds__(32 * kMostWarps, 1) clamp_kernel(const __grid_constant__ Clamp job, int warps) {
  __shared__ uint32_t shared[3][kMostWarps];
  const int lanes = 32 * warps, row = static_cast<int>(blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes);
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const bool vectors = job.cols % 8 == 0 && job.stride % 8 == 0 && reinterpret_cast<uintptr_t>(job.x) % 16 == 0;
  int keys[kOfThread];
  uint32_t unordered = 0;
#pragma unroll
  for (int n = 0; n < kOfThread / 8; ++n) {
    uint32_t words[4];
    read8(job, row, (n * lanes + lane) * 8, vectors, words);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t pair = ordered(words[i / 2]);
      const int magnitude = static_cast<int>(words[i / 2] >> (16 * (i % 2))) & 0x7fff;
      const int key = i % 2 ? static_cast<int>(pair) >> 16 : static_cast<int>(pair << 16) >> 16;
      keys[8 * n + i] = magnitude > 0x7f80 ? kUnordered : key;  // the largest to the one, the smallest to the other
      unordered += keys[8 * n + i] == kUnordered;
    }
  }
  unordered = of_row(unordered, warps, shared[2]);
  // NaN beyond the row's end count at neither end, its own at both
  const int beyond = lanes * kOfThread - job.cols, below_all = static_cast<int>(unordered) - beyond;
  int upper = -0x8000, lower = -0x8000;  // of the opposite order
  for (int i = 0; i < 16; ++i) {
    const int high = upper + (0x8000 >> i), low = lower + (0x8000 >> i), least = -1 - low;
    uint32_t counts = 0;
#pragma unroll
    for (int k = 0; k < kOfThread; ++k) counts += (keys[k] >= high ? 1u : 0u) + (keys[k] <= least ? 0x10000u : 0u);
    counts = of_row(counts, warps, shared[i & 1]);
    if (static_cast<int>(counts & 0xffffu) - beyond >= job.wanted) upper = high;
    if (static_cast<int>(counts >> 16) + below_all >= job.wanted) lower = low;
  }
  lower = -1 - lower;
  Limits limits{lower, upper, lower, upper};  // zeros of both signs are equal, and a limit has none
  if (upper == 0 || upper == -1) limits.upper = limits.upper_value = 0;
  if (lower == 0 || lower == -1) limits.lower = -1, limits.lower_value = 0;
  if (row >= job.rows) return;
#pragma unroll
  for (int n = 0; n < kOfThread / 8; ++n) {
    const int col = (n * lanes + lane) * 8;
    if (col >= job.cols) return;
    uint32_t rest[4], side[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int* pair = keys + 8 * n + 2 * i;
      const uint32_t a = clamped(pair[0], limits), b = clamped(pair[1], limits);
      rest[i] = a | b << 16;
      side[i] = bf16x2_nearest(floats(bf16_of(pair[0]) << 16) - floats(a << 16),
                               floats(bf16_of(pair[1]) << 16) - floats(b << 16));
    }
    const int64_t at = static_cast<int64_t>(row) * job.cols + col;
    write8(job.rest + at, job.cols - col, job.cols % 8 == 0, rest);
    if (job.side) write8(job.side + at, job.cols - col, job.cols % 8 == 0, side);
  }
}

// A thread has eight elements, `group` / 8 neighbouring lanes a group. A key is the magnitude, of which NaN have the
// largest, and below it the place, the first of equals above the others; 0 is taken.
__global__ void __launch_bounds__(kExtremeThreads) largest_kernel(const __grid_constant__ Largest job) {
  const uint32_t vectors = static_cast<uint32_t>(job.cols) / 8, wanted = blockIdx.x * kExtremeThreads + threadIdx.x;
  const uint32_t found = wanted / vectors, lanes = static_cast<uint32_t>(job.group) / 8;
  const bool inside = found < static_cast<uint32_t>(job.rows);
  const int64_t row = inside ? found : job.rows - 1, col = static_cast<int64_t>(wanted - found * vectors) * 8;
  Row<8, false> read;
  read.read(job.x, row * job.stride + col);
  const uint4 v = read.vectors[0];
  const uint32_t words[4] = {v.x, v.y, v.z, v.w}, place = threadIdx.x % lanes * 8;
  uint32_t keys[8];
#pragma unroll
  for (uint32_t i = 0; i < 8; ++i) {
    const uint32_t magnitude = words[i / 2] >> (16 * (i % 2)) & 0x7fffu;
    keys[i] = (magnitude > 0x7f80u ? 0x7f81u : magnitude) << 16 | (0xffffu - place - i);
  }
  uint32_t taken = 0;
  for (int k = 0; k < job.k; ++k) {
    uint32_t top = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) top = max(top, keys[i]);
    for (int step = 1; step < static_cast<int>(lanes); step *= 2) top = max(top, __shfl_xor_sync(kWarp, top, step));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (keys[i] != top) continue;
      keys[i] = 0;
      taken |= 1u << i;
    }
  }
  if (!inside) return;
  uint32_t side[4], rest[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t pair = taken >> (2 * i), mask = (pair & 1u) * 0xffffu | (pair >> 1 & 1u) * 0xffff0000u;
    side[i] = words[i] & mask;
    rest[i] = words[i] & ~mask;
  }
  reinterpret_cast<uint4*>(job.side)[wanted] = {side[0], side[1], side[2], side[3]};
  reinterpret_cast<uint4*>(job.rest)[wanted] = {rest[0], rest[1], rest[2], rest[3]};
}

}  // namespace

cudaError_t launch_clamp(const Clamp& job, cudaStream_t stream) {
  if (job.cols < 1 || job.cols > kLongestClamp || job.wanted < 1) return cudaErrorInvalidValue;
  int warps = 1;
  while (warps * 32 * kOfThread < job.cols) warps *= 2;
  const int threads = max(kExtremeThreads, 32 * warps), rows = threads / (32 * warps);
  const auto blocks = static_cast<unsigned>((job.rows + rows - 1) / rows);
  FP4DIST_LAUNCH(clamp_kernel, blocks, threads, 0, stream, job, warps);
  return cudaGetLastError();
}

cudaError_t launch_largest(const Largest& job, cudaStream_t stream) {
  const bool power = (job.group & (job.group - 1)) == 0, fits = job.group >= 8 && job.group <= kLongestGroup;
  const int64_t vectors = static_cast<int64_t>(job.rows) * (job.cols / 8);
  if (!power || !fits || job.cols % job.group || job.k > job.group || vectors > INT32_MAX) return cudaErrorInvalidValue;
  const auto blocks = static_cast<unsigned>((vectors + kExtremeThreads - 1) / kExtremeThreads);
  FP4DIST_LAUNCH(largest_kernel, blocks, kExtremeThreads, 0, stream, job);
  return cudaGetLastError();
}

}  // namespace fp4dist
