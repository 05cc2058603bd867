// Chosen channels and what they have beside their codes; slopes; fp32 as bf16. See parts.h.
#include "parts.h"

#include "portable.cuh"
#include "strips.cuh"
#include "tile.cuh"

namespace fp4dist {
namespace {

constexpr int kPartThreads = 256, kSide = 64;  // kSide: rows and columns of a tile that is turned
constexpr int kPitch = kSide + 1;

// Which of 16 columns are chosen, an element's bit in the place of its column.
__device__ __forceinline__ uint32_t chosen_bits(const uint8_t* chosen, int col) {
  const uint8_t* from = chosen + col;
  uint32_t found = 0;
  if (reinterpret_cast<uintptr_t>(from) % 4 == 0) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // the lowest bits of four bytes meet in the upper four of the product
      const uint32_t word = __ldg(reinterpret_cast<const uint32_t*>(from) + i) & 0x01010101u;
      found |= word * 0x10204080u >> 28 << (4 * i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kStrip; ++i) found |= static_cast<uint32_t>(from[i] & 1u) << i;
  }
  return found;
}

// Stores a strip of a matrix without gaps from element `start` on; none if that is negative. All lanes take part.
// EXACT: bf16 holds the values.
template <bool WIDE, bool EXACT>
__device__ __forceinline__ void store_strip(void* to, int64_t start, const float (&y)[kStrip]) {
  const long long at = start < 0 ? -1 : start * (WIDE ? 4 : 2);
  if constexpr (WIDE) {
    uint4 out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* z = y + 4 * i;
      out[i] = {bits(z[0]), bits(z[1]), bits(z[2]), bits(z[3])};
    }
    store_paired(to, at, out);
  } else {
    const auto pair = [](float a, float b) { return EXACT ? bf16x2_exact(a, b) : bf16x2_nearest(a, b); };
    uint4 out[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* z = y + 8 * i;
      out[i] = {pair(z[0], z[1]), pair(z[2], z[3]), pair(z[4], z[5]), pair(z[6], z[7])};
    }
    store_paired(to, at, out);
  }
}

// The nearest values of E4M3 under an E8M0 scale, rounded up, of 32 elements of a row that two lanes have.
__device__ __forceinline__ void in_mxfp8(float (&y)[kStrip]) {
  uint32_t top = 0;
#pragma unroll
  for (int i = 0; i < kStrip; ++i) top = max(top, bits(y[i]) & ~kSign);
  top = max(top, __shfl_xor_sync(kWarp, top, 1));
  const int own = static_cast<int>(top >> 23), byte = own - 8 + ((top & 0x7fffffu) > 0x600000u);  // 448 = 1.75 2^8
  const uint32_t stored = own == 255 ? 255u : static_cast<uint32_t>(byte < 0 ? 0 : byte);
  const float scale = e8m0_value(stored), inverse = e8m0_reciprocal(stored);
#pragma unroll
  for (int i = 0; i < kStrip; ++i) {
    y[i] = floats(with_sign(bits(e4m3_value(e4m3_nearest(fabsf(y[i] * inverse))) * scale), y[i]));
  }
}

// Rest and side of a strip of which `taken` are chosen.
template <bool WIDE>
__device__ __forceinline__ void take(const Take& job, int64_t start, uint32_t taken, float (&y)[kStrip]) {
  if (job.rest) {
    float rest[kStrip];
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      const bool chosen = taken >> i & 1u;
      rest[i] = chosen ? 0.0f : y[i];
      y[i] = chosen ? y[i] : 0.0f;
    }
    store_strip<WIDE, true>(job.rest, start, rest);
  }
  if (job.mx) in_mxfp8(y);
  store_strip<WIDE, true>(job.side, start, y);
}

__device__ __forceinline__ uint32_t taken_bits(const Take& job, int row, int col) {
  if (!job.chosen) return 0xffffu;
  return job.by_row ? (job.chosen[row] & 1u) * 0xffffu : chosen_bits(job.chosen, col);
}

// Where a thread's strip is. All threads of a block work, those behind the end on the last row without storing: lanes
// exchange.
struct Place16 {
  int row, col;
  int64_t start;

  __device__ Place16(int rows, int cols) {
    const uint32_t strips = static_cast<uint32_t>(cols) / kStrip;
    const uint32_t wanted = blockIdx.x * kPartThreads + threadIdx.x, found = wanted / strips;
    const bool inside = found < static_cast<uint32_t>(rows);
    row = inside ? static_cast<int>(found) : rows - 1;
    col = static_cast<int>((wanted - found * strips) * kStrip);
    start = inside ? static_cast<int64_t>(wanted) * kStrip : -1;
  }
};

template <bool WIDE>
__global__ void __launch_bounds__(kPartThreads) take_kernel(const __grid_constant__ Take job) {
  const Place16 at(job.rows, job.cols);
  Row<kStrip, WIDE> found;
  found.read(job.x, at.row * job.stride + at.col);
  float y[kStrip];
  found.get(y);
  take<WIDE>(job, at.start, taken_bits(job, at.row, at.col), y);
}

// Element (row, col) of a tile of memory: strips of 16 rows of neighbouring columns lie in different banks.
__device__ __forceinline__ int tile_at(int row, int col) { return row * kPitch + (row >> 5) * 8 + col; }

// Fills a tile from memory whose rows are the operand's columns; what is beyond the end is zero.
template <bool WIDE>
__device__ __forceinline__ void fill_tile(const Take& job, float* tile, int row, int col) {
  constexpr int kOfVector = WIDE ? 4 : 8, kVectors = kSide / kOfVector;
  const auto* memory = static_cast<const unsigned char*>(job.x);
  const bool vectors = reinterpret_cast<uintptr_t>(job.x) % 16 == 0 && job.stride % kOfVector == 0;
#pragma unroll
  for (int n = 0; n < kSide * kVectors / kPartThreads; ++n) {
    const int i = n * kPartThreads + static_cast<int>(threadIdx.x), r = i / kVectors, c = i % kVectors * kOfVector;
    float y[kOfVector];
    const int64_t at = (col + r) * job.stride + row + c;
    if (vectors && col + r < job.cols && row + c + kOfVector <= job.rows) {
      unpack<WIDE>(__ldg(reinterpret_cast<const uint4*>(memory + at * (WIDE ? 4 : 2))), y);
    } else {
#pragma unroll
      for (int k = 0; k < kOfVector; ++k) {
        y[k] = col + r < job.cols && row + c + k < job.rows ? element<WIDE>(job.x, at + k) : 0.0f;
      }
    }
#pragma unroll
    for (int k = 0; k < kOfVector; ++k) tile[tile_at(r, c + k)] = y[k];
  }
}

template <bool WIDE>
__global__ void __launch_bounds__(kPartThreads) take_turned_kernel(const __grid_constant__ Take job) {
  __shared__ float tile[kSide * kPitch + 8];
  const int across = (job.cols + kSide - 1) / kSide, first = static_cast<int>(blockIdx.x) / across;
  const int row0 = first * kSide, col0 = (static_cast<int>(blockIdx.x) - first * across) * kSide;
  fill_tile<WIDE>(job, tile, row0, col0);
  __syncthreads();
  const int down = threadIdx.x / 4, strip = threadIdx.x % 4 * kStrip, row = row0 + down, col = col0 + strip;
  const bool inside = row < job.rows && col < job.cols;
  float y[kStrip];
#pragma unroll
  for (int i = 0; i < kStrip; ++i) y[i] = tile[tile_at(strip + i, down)];
  take<WIDE>(job, inside ? static_cast<int64_t>(row) * job.cols + col : -1, inside ? taken_bits(job, row, col) : 0u, y);
}

template <bool WIDE>
__global__ void __launch_bounds__(kPartThreads) residual_kernel(const __grid_constant__ Residual job) {
  const Place16 at(job.rows, job.cols);
  const uint32_t taken = chosen_bits(job.chosen, at.col);
  float y[kStrip] = {};
  if (taken) {
    Row<kStrip, WIDE> found;
    found.read(job.x.data, at.row * job.x.stride + at.col);
    found.get(y);
    const int64_t strip = (static_cast<int64_t>(at.row) * job.cols + at.col) / kStrip;
    const uint2 codes = __ldg(static_cast<const uint2*>(job.codes) + strip);
    const int64_t block = static_cast<int64_t>(at.row / job.block_rows) * (job.cols / job.block_cols) +
                          at.col / job.block_cols;
    const float scale = stored_scale(job.scales, block, job.scale), outer = *job.outer;
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      const float value = e2m1_value((i < 8 ? codes.x : codes.y) << (28 - 4 * (i % 8))) * scale * outer;
      y[i] = taken >> i & 1u ? y[i] - value : 0.0f;
    }
  }
  store_strip<WIDE, false>(job.side, at.start, y);
}

__global__ void __launch_bounds__(kPartThreads) offsets_kernel(const __grid_constant__ Offsets job) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kPartThreads + threadIdx.x;
  if (at >= job.count) return;
  const double z = fabsf(job.u[at]);
  double low = job.levels[0], high = job.levels[1];
  for (int i = 1; i < job.last; ++i) {
    if (z >= job.levels[i]) low = job.levels[i], high = job.levels[i + 1];
  }
  const double found = 2.0 * (z - low) / (high - low) - 1.0;
  job.out[at] = z <= job.levels[job.last] ? fabs(found) : HUGE_VAL;
}

__global__ void __launch_bounds__(kPartThreads) terms_kernel(const __grid_constant__ Terms job) {
  constexpr int L = 8;
  const int64_t start = (static_cast<int64_t>(blockIdx.x) * kPartThreads + threadIdx.x) * L;
  if (start >= job.count) return;
  const bool whole = start + L <= job.count;
  float y[L] = {};
  if (whole) {
    Row<L, true> found;
    found.read(job.x, start);
    found.get(y);
  } else {
#pragma unroll
    for (int i = 0; i < L; ++i) y[i] = start + i < job.count ? job.x[start + i] : 0.0f;
  }
#pragma unroll
  for (int n = 0; n < 3; ++n) {
    uint32_t words[L / 2];
#pragma unroll
    for (int i = 0; i < L / 2; ++i) {
      words[i] = bf16x2_nearest(y[2 * i], y[2 * i + 1]);
      y[2 * i] = y[2 * i] - floats(words[i] << 16);
      y[2 * i + 1] = y[2 * i + 1] - floats(words[i] & 0xffff0000u);
    }
    uint16_t* to = job.terms[n] + start;
    if (whole) {
      *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
    } else {
#pragma unroll
      for (int i = 0; i < L; ++i) {
        if (start + i < job.count) to[i] = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
      }
    }
  }
}

int64_t blocks_for(int64_t number) { return (number + kPartThreads - 1) / kPartThreads; }

}  // namespace

cudaError_t launch_take(const Take& job, cudaStream_t stream) {
  const int64_t strips = static_cast<int64_t>(job.rows) * (job.cols / kStrip);
  if (job.cols % (job.mx ? 2 * kStrip : kStrip) || strips > INT32_MAX) return cudaErrorInvalidValue;
  if (job.turned) {
    const auto tiles = static_cast<unsigned>((job.rows + kSide - 1) / kSide) * ((job.cols + kSide - 1) / kSide);
    const auto kernel = job.wide ? &take_turned_kernel<true> : &take_turned_kernel<false>;
    FP4DIST_LAUNCH(kernel, tiles, kPartThreads, 0, stream, job);
  } else {
    const auto kernel = job.wide ? &take_kernel<true> : &take_kernel<false>;
    FP4DIST_LAUNCH(kernel, static_cast<unsigned>(blocks_for(strips)), kPartThreads, 0, stream, job);
  }
  return cudaGetLastError();
}

cudaError_t launch_residual(const Residual& job, cudaStream_t stream) {
  const int64_t strips = static_cast<int64_t>(job.rows) * (job.cols / kStrip);
  if (job.cols % kStrip || job.block_cols % kStrip || strips > INT32_MAX) return cudaErrorInvalidValue;
  const auto kernel = job.x.wide ? &residual_kernel<true> : &residual_kernel<false>;
  FP4DIST_LAUNCH(kernel, static_cast<unsigned>(blocks_for(strips)), kPartThreads, 0, stream, job);
  return cudaGetLastError();
}

cudaError_t launch_offsets(const Offsets& job, cudaStream_t stream) {
  const int64_t blocks = blocks_for(job.count);
  if (job.last < 1 || job.last >= kMostLevels || blocks > INT32_MAX) return cudaErrorInvalidValue;
  FP4DIST_LAUNCH(offsets_kernel, static_cast<unsigned>(blocks), kPartThreads, 0, stream, job);
  return cudaGetLastError();
}

cudaError_t launch_terms(const Terms& job, cudaStream_t stream) {
  const int64_t blocks = blocks_for((job.count + 7) / 8);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  FP4DIST_LAUNCH(terms_kernel, static_cast<unsigned>(blocks), kPartThreads, 0, stream, job);
  return cudaGetLastError();
}

}  // namespace fp4dist
