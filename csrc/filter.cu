// Gradients through quantizers with a trust mask; codes back from their rotated basis. See filter.h.
#include "filter.h"

#include "flips.cuh"
#include "portable.cuh"
#include "strips.cuh"
#include "tile.cuh"

namespace fp4dist {
namespace {

constexpr int kFilterThreads = 256;

// Where a thread's strip is. All threads of a block work, those behind the end on the last strip without storing: lanes
// exchange.
struct Spot16 {
  int row, col;
  bool inside;

  __device__ explicit Spot16(const Filter& job) {
    const uint32_t strips = static_cast<uint32_t>(job.cols) / kStrip;  // unsigned: divisions by half the instructions
    const uint32_t wanted = blockIdx.x * kFilterThreads + threadIdx.x;
    const uint32_t found = wanted / strips;
    inside = found < static_cast<uint32_t>(job.rows);
    row = inside ? static_cast<int>(found) : job.rows - 1;
    col = static_cast<int>((wanted - found * strips) * kStrip);
  }
};

__device__ __forceinline__ void read_row(const RowMajor& from, int row, int col, float (&y)[kStrip]) {
  if (from.wide) {
    Row<kStrip, true> next;
    next.read(from.data, row * from.stride + col);
    next.get(y);
  } else {
    Row<kStrip, false> next;
    next.read(from.data, row * from.stride + col);
    next.get(y);
  }
}

__device__ __forceinline__ float scale_of(const Filter& job, int row, int col) {
  const int64_t at = static_cast<int64_t>(row / job.block_rows) * (job.cols / job.block_cols) + col / job.block_cols;
  return stored_scale(job.scales, at, job.scale);
}

// Bits of the strip of x where its quantizer did not clip.
__device__ __forceinline__ uint32_t inside_bits(const Filter& job, int row, int col, uint32_t signs) {
  float y[kStrip];
  read_row(job.x, row, col, y);
  rotate_strip(y, job.rotation, signs, col);
  const float scale = scale_of(job, row, col);
  float multiplier;
  if (job.powers) {
    multiplier = __fdiv_rn(1.0f, scale) * job.after;
  } else {
    const int64_t at = static_cast<int64_t>(row / job.outer_rows) * (job.cols / job.outer_cols) + col / job.outer_cols;
    multiplier = __fdiv_rn(1.0f, scale * job.outer[at]);
  }
  multiplier = below(multiplier, kMaxFloat);
  uint32_t found = 0;
#pragma unroll
  for (int i = 0; i < kStrip; ++i) {
    const float z = job.powers ? y[i] * job.before : y[i];
    found |= fabsf(z * multiplier) <= job.largest ? 1u << i : 0u;
  }
  return found;
}

__device__ __forceinline__ void store_row(const Filter& job, const Spot16& at, const float (&y)[kStrip]) {
  if (!at.inside) return;
  const int64_t start = static_cast<int64_t>(at.row) * job.cols + at.col;
  if (job.wide_out) {
    auto* to = static_cast<float*>(job.out) + start;
    if (reinterpret_cast<uintptr_t>(to) % 16 == 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        reinterpret_cast<float4*>(to)[i] = {y[4 * i], y[4 * i + 1], y[4 * i + 2], y[4 * i + 3]};
      }
    } else {
#pragma unroll
      for (int i = 0; i < kStrip; ++i) to[i] = y[i];
    }
    return;
  }
  auto* to = reinterpret_cast<uint4*>(static_cast<uint16_t*>(job.out) + start);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float* z = y + 8 * i;
    to[i] = {bf16x2_nearest(z[0], z[1]), bf16x2_nearest(z[2], z[3]), bf16x2_nearest(z[4], z[5]),
             bf16x2_nearest(z[6], z[7])};
  }
}

__global__ void __launch_bounds__(kFilterThreads) mask_kernel(const __grid_constant__ Filter job) {
  const Spot16 at(job);
  const uint32_t found = inside_bits(job, at.row, at.col, signs_at(job.signs, job.rotation, at.col));
  if (at.inside) {
    static_cast<uint16_t*>(job.out)[static_cast<int64_t>(at.row) * (job.cols / kStrip) + at.col / kStrip] =
        static_cast<uint16_t>(found);
  }
}

// The most frequent filter, bits of rotated groups of 32: what `filter_kernel` asks of the job is known here. A thread
// has half a group; a whole one would lie too far from its neighbours' for memory.
template <bool WIDE>
__global__ void __launch_bounds__(kFilterThreads) filter32_kernel(const __grid_constant__ Filter job) {
  constexpr int L = kStrip, kGroup = 32;
  const uint32_t strips = static_cast<uint32_t>(job.cols) / L, wanted = blockIdx.x * kFilterThreads + threadIdx.x;
  const uint32_t row = wanted / strips, col = (wanted - row * strips) * L;
  const bool inside = row < static_cast<uint32_t>(job.rows);
  const uint64_t start = inside ? static_cast<uint64_t>(wanted) * L : 0;
  Row<L, WIDE> read;
  read.read(job.g.data, inside ? row * job.g.stride + col : 0);
  const uint32_t passes = __ldg(job.kept + start / L);
  const uint32_t* masks = masks_of<kGroup, true>(job.signs);
  if (masks) __syncthreads();
  const uint32_t signs = WIDE || job.wide_out ? signs_at(job.signs, kGroup, 0) >> (col % kGroup) : 0u;
  float y[L];
  if constexpr (!WIDE) {
    if (masks) flip_pairs<kGroup>(masks, col, read.vectors);
  }
  read.get(y);
  if (WIDE && masks) flip(y, signs);
  butterflies<kGroup>(y);
  // a product and not a choice: Inf and NaN that do not pass must still show
#pragma unroll
  for (int i = 0; i < L; ++i) y[i] = y[i] * (passes >> i & 1u ? 1.0f : 0.0f);
  butterflies<kGroup>(y);
#pragma unroll
  for (int i = 0; i < L; ++i) y[i] = y[i] * job.inverse;
  if (job.wide_out) {
    if (masks) flip(y, signs);
    auto* to = reinterpret_cast<float4*>(static_cast<float*>(job.out) + start);
    if (!inside) return;
#pragma unroll
    for (int i = 0; i < L / 4; ++i) {
      float4 total = {-0.0f, -0.0f, -0.0f, -0.0f};  // to which y is added without a change
      if (job.add) total = to[i];
      to[i] = {total.x + y[4 * i], total.y + y[4 * i + 1], total.z + y[4 * i + 2], total.w + y[4 * i + 3]};
    }
    return;
  }
  uint4 out[L / 8];
#pragma unroll
  for (int i = 0; i < L / 8; ++i) {
    const float* z = y + 8 * i;
    out[i] = {bf16x2_nearest(z[0], z[1]), bf16x2_nearest(z[2], z[3]), bf16x2_nearest(z[4], z[5]),
              bf16x2_nearest(z[6], z[7])};
  }
  if (masks) flip_pairs<kGroup>(masks, col, out);
  store_paired(job.out, inside ? static_cast<int64_t>(2 * start) : -1, out);
}

__global__ void __launch_bounds__(kFilterThreads) filter_kernel(const __grid_constant__ Filter job) {
  const Spot16 at(job);
  const uint32_t signs = signs_at(job.signs, job.rotation, at.col);
  const uint32_t passes =
      job.kept ? job.kept[static_cast<int64_t>(at.row) * (job.cols / kStrip) + at.col / kStrip]
               : inside_bits(job, at.row, at.col, signs);
  float y[kStrip];
  read_row(job.g, at.row, at.col, y);
  rotate_strip(y, job.rotation, signs, at.col);
  // a product and not a choice: Inf and NaN that do not pass must still show
#pragma unroll
  for (int i = 0; i < kStrip; ++i) y[i] = y[i] * (passes >> i & 1u ? 1.0f : 0.0f);
  if (job.rotation > 1) {
    turn(y, job.rotation);
#pragma unroll
    for (int i = 0; i < kStrip; ++i) y[i] = y[i] * job.inverse;
  }
  flip(y, signs >> (at.col % 32));
  if (job.add) {
    const float* total = static_cast<const float*>(job.out) + static_cast<int64_t>(at.row) * job.cols + at.col;
#pragma unroll
    for (int i = 0; i < kStrip; ++i) y[i] = total[i] + y[i];
  }
  store_row(job, at, y);
}

__global__ void __launch_bounds__(kFilterThreads) turn_back_kernel(const __grid_constant__ Filter job) {
  const Spot16 at(job);
  const int64_t word = (static_cast<int64_t>(at.row) * job.cols + at.col) / kStrip;
  const uint2 codes = __ldg(static_cast<const uint2*>(job.x.data) + word);
  const float scale = scale_of(job, at.row, at.col), factor = *job.outer;
  float y[kStrip];
#pragma unroll
  for (int i = 0; i < kStrip; ++i) {
    y[i] = e2m1_value((i < 8 ? codes.x : codes.y) << (28 - 4 * (i % 8))) * scale * factor;
  }
  turn(y, job.rotation);
#pragma unroll
  for (int i = 0; i < kStrip; ++i) y[i] = y[i] * job.inverse;
  flip(y, signs_at(job.signs, job.rotation, at.col) >> (at.col % 32));
  store_row(job, at, y);
}

unsigned blocks_of(const Filter& job) {
  const int64_t strips = static_cast<int64_t>(job.rows) * (job.cols / kStrip);
  return static_cast<unsigned>((strips + kFilterThreads - 1) / kFilterThreads);
}

}  // namespace

cudaError_t launch_mask(const Filter& job, cudaStream_t stream) {
  if (static_cast<int64_t>(job.rows) * (job.cols / kStrip) > INT32_MAX) return cudaErrorInvalidValue;
  FP4DIST_LAUNCH(mask_kernel, blocks_of(job), kFilterThreads, 0, stream, job);
  return cudaGetLastError();
}

// Whether the output is of vectors, and the rest what `filter32_kernel` knows.
bool is_of_32(const Filter& job) {
  return job.kept && job.rotation == 32 && job.cols % 32 == 0 && reinterpret_cast<uintptr_t>(job.out) % 16 == 0;
}

cudaError_t launch_filter(const Filter& job, cudaStream_t stream) {
  if (static_cast<int64_t>(job.rows) * (job.cols / kStrip) > INT32_MAX) return cudaErrorInvalidValue;
  if (is_of_32(job)) {
    const auto kernel = job.g.wide ? &filter32_kernel<true> : &filter32_kernel<false>;
    FP4DIST_LAUNCH(kernel, blocks_of(job), kFilterThreads, 0, stream, job);
    return cudaGetLastError();
  }
  FP4DIST_LAUNCH(filter_kernel, blocks_of(job), kFilterThreads, 0, stream, job);
  return cudaGetLastError();
}

cudaError_t launch_turn_back(const Filter& job, cudaStream_t stream) {
  if (static_cast<int64_t>(job.rows) * (job.cols / kStrip) > INT32_MAX) return cudaErrorInvalidValue;
  FP4DIST_LAUNCH(turn_back_kernel, blocks_of(job), kFilterThreads, 0, stream, job);
  return cudaGetLastError();
}

Filter filter_of(const FilterPointers& p, const int64_t* n, const double* f) {
  const auto number = [n](int i) { return static_cast<int32_t>(n[i]); };
  Filter job{};
  job.rows = number(0);
  job.cols = number(1);
  job.g = {p.g, n[2], number(3)};
  job.x = {p.x, n[4], number(5)};
  int32_t* const settings[] = {&job.block_rows, &job.block_cols, &job.outer_rows, &job.outer_cols, &job.scale,
                               &job.powers,     &job.rotation,   &job.wide_out,   &job.add};
  for (int i = 0; i < 9; ++i) *settings[i] = number(6 + i);
  job.signs.mode = number(15);
  for (int i = 0; i < 4; ++i) job.signs.words[i] = static_cast<uint32_t>(n[16 + i]);
  job.signs.place = place_of(n + 20, nullptr, p.when);
  job.kept = static_cast<const uint16_t*>(p.kept);
  job.scales = p.scales;
  job.outer = static_cast<const float*>(p.outer);
  job.before = static_cast<float>(f[0]);
  job.after = static_cast<float>(f[1]);
  job.largest = static_cast<float>(f[2]);
  job.inverse = static_cast<float>(f[3]);
  job.out = p.out;
  return job;
}

}  // namespace fp4dist
