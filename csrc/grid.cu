// The general quantizer: its kernels and entry points. See grid.h.
#include "grid.h"

#include "grid.cuh"

namespace fp4dist {
namespace {

// What an instance is made for, so that registers hold no more than it needs.
enum Kind { kOnce, kBest, kEdenLike };

// A tile in shared memory, and a thread's strip of it in the basis of the codes.
__device__ __forceinline__ void read_strip(const Matrix& m, const GridJob& job, const Shape& shape, const Strip& at,
                                           int row, int col, uint32_t signs, float* tile, float (&y)[kStrip]) {
  stage(m, job, shape, row, col, tile);
  __syncthreads();
  strip_of(tile, shape, at, y);
  rotate_strip(y, job.rotation, signs, col + at.col);
}

// The noise of eight elements, and of one block.
__device__ __forceinline__ Words element_words(const Place& place, const Moment& now, int row, int col) {
  const uint32_t line = global_row(place, static_cast<uint32_t>(row)) * place.width;
  return draw(place, now, line + global_group(place, static_cast<uint32_t>(col / 8)));
}

__device__ __forceinline__ uint32_t block_word(const Place& place, int row, int block) {
  const uint64_t at = static_cast<uint64_t>(global_row(place, static_cast<uint32_t>(row))) * place.width +
                      global_group(place, static_cast<uint32_t>(block));
  const Words words = draw(place, moment(place), static_cast<uint32_t>(at / 4));
  const uint32_t which = at % 4;
  return which == 0 ? words.w[0] : which == 1 ? words.w[1] : which == 2 ? words.w[2] : words.w[3];
}

// Rounds with the noise of a place.
__device__ __forceinline__ void round_noisy(const GridJob& job, const Place& place, const float* y, const float* u,
                                            int row, int col, Codes16& out) {
#pragma unroll
  for (int i = 0; i < 4; ++i) out.words[i] = 0;
  const Moment now = moment(place);
#pragma unroll
  for (int g = 0; g < kStrip / 8; ++g) {
    const Words noise = element_words(place, now, row, col + 8 * g);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int i = 8 * g + j;
      const uint32_t half = (noise.w[j / 2] >> (16 * (j % 2))) & 0xffffu;
      const uint32_t index = by_noise(job.grid, below(fabsf(u[i]), job.grid.largest), half);
      out.level[i] = level_at(job.grid, index);
      put(job.grid, out, i, index, u[i], y[i]);
    }
  }
}

// Rounds toward a scaled average.
__device__ __forceinline__ void round_toward(const GridJob& job, const float* y, const float* u, const float* average,
                                             float multiplier, Codes16& out) {
  const float limit = job.grid.largest;
#pragma unroll
  for (int i = 0; i < 4; ++i) out.words[i] = 0;
#pragma unroll
  for (int i = 0; i < kStrip; ++i) {
    const float wanted = average[i] * job.before * multiplier, t = wanted < -limit ? -limit : below(wanted, limit);
    const uint32_t index = nearer_to(job.grid, below(fabsf(u[i]), limit), bits(y[i]) & kSign ? -t : t);
    put(job.grid, out, i, index, u[i], y[i]);
  }
}

// The error of a block's levels under a scale.
__device__ __forceinline__ float error_of(const GridJob& job, const Shape& shape, const float* y, const float* level,
                                          float scale, float unit, float* meeting) {
  float d[kStrip];
#pragma unroll
  for (int i = 0; i < kStrip; ++i) d[i] = fabsf(y[i]) - level[i] * scale * unit;
  if (job.metric == 2) return largest_of(largest<kStrip>(d), 1, shape.lanes, meeting);
#pragma unroll
  for (int i = 0; i < kStrip; ++i) d[i] = job.metric == 0 ? d[i] * d[i] : fabsf(d[i]);
  return sum_of(tree_sum<kStrip>(d), shape.lanes, meeting);
}

// <u, u> / <u, c> over the columns that share a correction; 1 where the denominator is 0.
__device__ __forceinline__ float correction(const GridJob& job, const float* u, const Codes16& codes, float* meeting) {
  float z[kStrip];
#pragma unroll
  for (int i = 0; i < kStrip; ++i) z[i] = fabsf(u[i]) * codes.level[i];
  const float products = sum_of(tree_sum<kStrip>(z), job.group / kStrip, meeting);
#pragma unroll
  for (int i = 0; i < kStrip; ++i) z[i] = u[i] * u[i];
  const float squares = sum_of(tree_sum<kStrip>(z), job.group / kStrip, meeting);
  return products == 0.0f ? 1.0f : __fdiv_rn(squares, products);
}

__device__ __forceinline__ void scaled_strip(const float* y, float factor, float multiplier, float (&u)[kStrip]) {
#pragma unroll
  for (int i = 0; i < kStrip; ++i) u[i] = y[i] * factor * multiplier;
}

// The scale with the least error, and its codes; a tie keeps the earlier.
__device__ __forceinline__ Chosen search(const GridJob& job, const Shape& shape, const float* y, float raw, float unit,
                                         int row, int col, float* meeting, Codes16& codes) {
  Chosen chosen{};
  float least = 0.0f;
#pragma unroll 1
  for (int k = 0; k < job.tries; ++k) {
    const float wanted = k == 0 ? raw : raw * job.stretches[k];
    const Chosen tried = job.scale == kFloat32
                             ? Chosen{bits(wanted), wanted, below(__fdiv_rn(1.0f, wanted), kMaxFloat)}
                             : scale_under(job, wanted, unit);
    float u[kStrip];
    scaled_strip(y, 1.0f, tried.multiplier, u);
    Codes16 found;
    if (job.rounding == kByNoise) {
      round_noisy(job, k == 0 ? job.noise : job.blocks, y, u, row, col, found);
    } else {
      round_nearest(job.grid, y, u, found);
    }
    const float error = error_of(job, shape, y, found.level, tried.value, unit, meeting);
    if (k != 0 && !(error < least)) continue;
    chosen = tried;
    least = error;
#pragma unroll
    for (int i = 0; i < 4; ++i) codes.words[i] = found.words[i];
  }
  return chosen;
}

// MS-EDEN's codes under the `wanted` scale, that scale as it is used, and its correction.
struct Eden {
  float scale, multiplier, correction;
};

__device__ __forceinline__ Eden eden_codes(const GridJob& job, const float* y, float wanted, float unit, float* meeting,
                                           Codes16& codes) {
  Eden found;
  if (job.post_hoc) {
    found.scale = floats(bits(wanted) & (0xffffffffu << job.truncate));
    found.multiplier = fabsf(found.scale) < kMinNormal ? 0.0f : __fdiv_rn(1.0f, found.scale);
  } else {
    const uint32_t byte = e4m3_nearest(wanted);
    found.scale = e4m3_value(byte);
    found.multiplier = byte == 0 ? 0.0f : multiplier_of(found.scale, unit);
  }
  float u[kStrip];
  scaled_strip(y, 1.0f, found.multiplier, u);
  round_nearest(job.grid, y, u, codes);
  found.correction = correction(job, u, codes, meeting);
  return found;
}

// The corrected scale of a block.
__device__ __forceinline__ float eden_scale(const GridJob& job, const Shape& shape, const float* y, float wanted,
                                            float unit, float* meeting, Codes16& codes) {
  if (job.tries > 1) {
    const Eden a = eden_codes(job, y, wanted, unit, meeting, codes);
    const float error = error_of(job, shape, y, codes.level, a.scale, unit, meeting);
    const Eden b = eden_codes(job, y, wanted * 1.5f, unit, meeting, codes);
    const bool fits = job.post_hoc || b.scale * b.correction <= 448.0f;
    if (error_of(job, shape, y, codes.level, b.scale, unit, meeting) < error && fits) wanted = wanted * 1.5f;
  }
  const Eden found = eden_codes(job, y, wanted, unit, meeting, codes);
  return found.scale * found.correction;
}

template <Kind KIND>
__global__ void __launch_bounds__(kGridThreads, 2) grid_kernel(const __grid_constant__ GridJob job) {
  FP4DIST_DYNAMIC_SHARED(memory);
  __shared__ float meeting[kGridThreads];
  auto* tile = reinterpret_cast<float*>(memory);
  const Shape shape(job);
  const Strip at(job, shape);
  const int across = (job.cols + shape.columns - 1) / shape.columns;
  const int first_row = static_cast<int>(blockIdx.x) / across * shape.rows;
  const int first_col = static_cast<int>(blockIdx.x) % across * shape.columns;
  const int row = first_row + at.row, col = first_col + at.col;
  const bool inside = row < job.rows && col < job.cols;
  const uint32_t signs = signs_at(job.signs, job.rotation, col);
  float y[kStrip];
  read_strip(job.x, job, shape, at, first_row, first_col, signs, tile, y);

  Chosen chosen{0, 1.0f, 1.0f};
  float unit = 1.0f, raw = 0.0f, found = 0.0f;
  if (KIND == kOnce && job.rule == kGiven) {
    chosen.multiplier = job.given_by_row ? (inside ? job.given[row] : 0.0f) : *job.given;
  } else {
    found = largest_of(largest<kStrip>(y), 1, shape.lanes, meeting);
    if (KIND == kOnce && (job.rule == kSpreadBelow || job.rule == kSpreadNearest)) {
      found = spread_step(job, shape, y, found, meeting) + 1e-8f;
    }
    if (KIND == kOnce && job.scale == kE8M0) {
      chosen = power_scale(job, found);
    } else if (KIND != kEdenLike && job.scale == kFloat32) {
      chosen = float_scale(job, found);
      raw = chosen.value;
    } else if (KIND == kEdenLike && job.post_hoc) {
      raw = __fdiv_rn(found, job.v);
    } else {
      const float s_enc = outer_scale(job, shape, found, row, col, inside, meeting);
      unit = __fdiv_rn(1.0f, s_enc);
      raw = found * (s_enc * job.inverse_v);
      const bool finite = (bits(found) & 0x7fffffffu) < kInfinity;
      if (KIND != kEdenLike && job.above == kNothing && !finite) raw = not_a_number();
      if constexpr (KIND == kOnce) chosen = scale_under(job, raw, unit);
    }
  }
  Codes16 codes;
  if constexpr (KIND == kBest) {
    chosen = search(job, shape, y, raw, unit, row, col, meeting, codes);
  } else if constexpr (KIND == kEdenLike) {
    const float corrected = eden_scale(job, shape, y, raw, unit, meeting, codes);
    const uint32_t magnitude = bits(corrected) & 0x7fffffffu;
    if (job.post_hoc) {
      const uint32_t top = __reduce_max_sync(kWarp, inside ? magnitude : 0u);
      if (threadIdx.x % 32 == 0 && top != 0) atomicMax(reinterpret_cast<uint32_t*>(job.outers), top);
      chosen.stored = bits(corrected);
    } else {
      chosen.stored = e4m3_stochastic(corrected, block_word(job.blocks, row, col / job.block_cols));
    }
  } else {
    float u[kStrip];
    scaled_strip(y, job.before, chosen.multiplier, u);
    if (job.rounding == kByNoise) {
      round_noisy(job, job.noise, y, u, row, col, codes);
    } else if (job.rounding == kTowardAverage) {
      float average[kStrip];
      __syncthreads();  // the tile is read
      read_strip(job.toward, job, shape, at, first_row, first_col, signs, tile, average);
      round_toward(job, y, u, average, chosen.multiplier, codes);
    } else {
      round_nearest(job.grid, y, u, codes);
    }
  }
  store_strip(job, codes, row, col);
  if (job.rule != kGiven) store_chosen(job, shape, chosen.stored, row, col, inside);
}

__global__ void __launch_bounds__(kGridThreads, 2)
    grid_largest_kernel(const __grid_constant__ GridJob job, bool by_row, uint32_t* top) {
  FP4DIST_DYNAMIC_SHARED(memory);
  __shared__ uint32_t tops[kGridThreads / 32];
  const Shape shape(job);
  const Strip at(job, shape);
  const int across = (job.cols + shape.columns - 1) / shape.columns;
  const int first_row = static_cast<int>(blockIdx.x) / across * shape.rows;
  const int first_col = static_cast<int>(blockIdx.x) % across * shape.columns;
  const int row = first_row + at.row, col = first_col + at.col;
  float y[kStrip];
  read_strip(job.x, job, shape, at, first_row, first_col, signs_at(job.signs, job.rotation, col),
             reinterpret_cast<float*>(memory), y);
  uint32_t found = bits(largest<kStrip>(y)) & 0x7fffffffu;
  if (by_row) {  // a row's strips are neighbouring lanes
    for (int lanes = 1; lanes < shape.columns / kStrip; lanes *= 2) {
      const uint32_t shown = __shfl_xor_sync(kWarp, found, lanes);
      found = shown > found ? shown : found;
    }
    if (at.col == 0 && row < job.rows && found != 0) atomicMax(top + row, found);
    return;
  }
  found = __reduce_max_sync(kWarp, found);
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = found;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  found = __reduce_max_sync(kWarp, threadIdx.x < kGridThreads / 32 ? tops[threadIdx.x] : 0u);
  if (threadIdx.x == 0 && found != 0) atomicMax(top, found);
}

unsigned tiles_of(const GridJob& job) {
  const Shape shape(job);
  const int64_t down = (job.rows + shape.rows - 1) / shape.rows;
  return static_cast<unsigned>(down * ((job.cols + shape.columns - 1) / shape.columns));
}

int shared_of(const GridJob& job) {
  const Shape shape(job);
  return shape.rows * shape.pitch * static_cast<int>(sizeof(float));
}

template <Kind KIND>
cudaError_t launch_kind(const GridJob& job, cudaStream_t stream) {
  const auto kernel = &grid_kernel<KIND>;
  FP4DIST_LAUNCH(kernel, tiles_of(job), kGridThreads, shared_of(job), stream, job);
  return cudaGetLastError();
}

bool power_of_two(int n) { return n > 0 && (n & (n - 1)) == 0; }

}  // namespace

const char* why_not(const GridJob& job) {
  const int rows = job.block_rows, cols = job.block_cols;
  if (!power_of_two(cols) || cols < kStrip || cols > 256) return "blocks of 16 to 256 columns, a power of two";
  if (!power_of_two(rows) || rows * cols > kGridElements) return "blocks of at most 4096 elements";
  if (!power_of_two(job.rotation) || job.rotation > 128 || (job.rotation > 1 && job.rotation < kStrip)) {
    return "rotations of 16 to 128";
  }
  if (rows > 1 && (job.rotation > 1 || job.above > kOfTensor)) return "rotations and outer scales of rows of one row";
  if (job.above == kOfTiles && (!power_of_two(job.tile) || job.tile < cols || job.tile > 256)) {
    return "outer tiles of up to 256 columns, a power of two";
  }
  if (job.group < kStrip || job.group > 256 || !power_of_two(job.group)) return "groups of 16 to 256 columns";
  if (job.tries < 0 || job.tries > kMostTries) return "at most 128 tries";
  return nullptr;
}

cudaError_t launch_grid(const GridJob& job, cudaStream_t stream) {
  if (why_not(job) != nullptr) return cudaErrorInvalidValue;
  if (job.rule == kSearch) return launch_kind<kBest>(job, stream);
  if (job.rule == kCorrected) return launch_kind<kEdenLike>(job, stream);
  return launch_kind<kOnce>(job, stream);
}

cudaError_t launch_grid_largest(const GridJob& job, bool by_row, uint32_t* top, cudaStream_t stream) {
  if (why_not(job) != nullptr || job.block_rows != 1) return cudaErrorInvalidValue;
  FP4DIST_LAUNCH(grid_largest_kernel, tiles_of(job), kGridThreads, shared_of(job), stream, job, by_row, top);
  return cudaGetLastError();
}

GridJob grid_job_of(const GridPointers& p, const int64_t* n, const double* f) {
  const auto number = [n](int i) { return static_cast<int32_t>(n[i]); };
  const auto real = [f](int i) { return static_cast<float>(f[i]); };
  GridJob job{};
  job.x = {p.data, n[0], n[1], number(2)};
  job.rows = number(3);
  job.cols = number(4);
  job.toward = {p.toward, n[5], n[6], number(7)};
  job.given = static_cast<const float*>(p.given);
  job.given_by_row = number(8);
  job.outer = static_cast<const float*>(p.outer);
  int32_t* const settings[] = {&job.rotation, &job.block_rows, &job.block_cols, &job.rule,
                               &job.scale,    &job.above,      &job.tile,       &job.nonzero,
                               &job.about_mean, &job.metric,   &job.group,      &job.rounding,
                               &job.exponent};
  for (int i = 0; i < 13; ++i) *settings[i] = number(9 + i);
  job.mantissa = static_cast<uint32_t>(n[22]);
  Grid& grid = job.grid;
  int32_t* const of_grid[] = {&grid.e2m1, &grid.mantissa, &grid.by_sign, &grid.last};
  for (int i = 0; i < 4; ++i) *of_grid[i] = number(23 + i);
  grid.sign = static_cast<uint32_t>(n[27]);
  grid.packed = number(28);
  job.signs.mode = number(29);
  for (int i = 0; i < 4; ++i) job.signs.words[i] = static_cast<uint32_t>(n[30 + i]);
  job.signs.place = place_of(n + 34, nullptr, p.when);
  job.noise = place_of(n + 39, n + 44, p.when);
  job.blocks = place_of(n + 51, n + 56, p.when);
  float* const factors[] = {&job.numerator, &job.inverse_v, &job.v,      &job.before,
                            &job.after,     &job.finer,     &job.factor, &grid.largest};
  for (int i = 0; i < 8; ++i) *factors[i] = real(i);
  for (int i = 0; i < kLevels - 1; ++i) {
    grid.bounds[i] = real(8 + i);
    grid.negative[i] = real(15 + i);
    grid.steps[i] = real(22 + i);
  }
  for (int i = 0; i < kLevels; ++i) {
    grid.levels[i] = real(29 + i);
    grid.inverse_gaps[i] = real(37 + i);
    grid.middles[i] = real(45 + i);
  }
  job.tries = number(63);
  job.truncate = number(64);
  job.post_hoc = number(65);
  for (int i = 0; i < kMostTries && job.rule == kSearch && i < job.tries; ++i) job.stretches[i] = real(53 + i);
  job.codes = static_cast<uint8_t*>(p.codes);
  job.scales = p.scales;
  job.outers = static_cast<float*>(p.outers);
  return job;
}

}  // namespace fp4dist
