// The general quantizer of one tile. A block of threads owns 4096 elements in shared memory, whole blocks, rotation
// groups and outer tiles of them; lanes that share a scale are neighbours: first those along columns, then the rows.
#pragma once

#include "portable.cuh"
#include "strips.cuh"

namespace fp4dist {

constexpr int kGridThreads = 256;
constexpr int kGridElements = kGridThreads * kStrip;

// What a tile is made of. lanes: threads that share a block scale.
struct Shape {
  int columns, rows, pitch, lanes, lanes_of_row;

  __host__ __device__ explicit Shape(const GridJob& job) {
    const int widest = job.block_cols > job.rotation ? job.block_cols : job.rotation;
    columns = widest > 128 || job.tile > 128 ? 256 : 128;
    if (columns > kGridElements / job.block_rows) columns = kGridElements / job.block_rows;
    rows = kGridElements / columns;
    pitch = columns + columns / kStrip + 1;  // neither rows nor strips meet in a bank
    lanes_of_row = job.block_cols / kStrip;
    lanes = lanes_of_row * job.block_rows;
  }
};

// Where a thread's strip lies in its tile.
struct Strip {
  int row, col;

  __device__ explicit Strip(const GridJob& job, const Shape& shape) {
    const int thread = static_cast<int>(threadIdx.x), part = thread % shape.lanes_of_row;
    const int of_row = thread / shape.lanes_of_row, rest = thread / shape.lanes;
    const int across = shape.columns / job.block_cols;
    row = rest / across * job.block_rows + of_row % job.block_rows;
    col = rest % across * job.block_cols + part * kStrip;
  }
};

__device__ __forceinline__ float element_of(const Matrix& m, int64_t at) {
  if (m.wide) return static_cast<const float*>(m.data)[at];
  return floats(static_cast<uint32_t>(static_cast<const uint16_t*>(m.data)[at]) << 16);
}

// 16 bytes of memory -> eight bf16, or four fp32.
__device__ __forceinline__ int unpacked(const uint4& v, bool wide, float (&y)[8]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (wide) {
      y[i] = floats(words[i]);
    } else {
      y[2 * i] = floats(words[i] << 16);
      y[2 * i + 1] = floats(words[i] & 0xffff0000u);
    }
  }
  return wide ? 4 : 8;
}

// Fills `tile` with the elements from (row, col) on, zeros outside; a thread's neighbours read what is next in memory.
__device__ __forceinline__ void stage(const Matrix& m, const GridJob& job, const Shape& shape, int row, int col,
                                      float* tile) {
  const bool across = m.column_stride == 1;
  const int bits_fast = 31 - __clz(across ? shape.columns : shape.rows);  // both are powers of two
  const int64_t slow_stride = across ? m.row_stride : m.column_stride;
  const int fast_end = across ? job.cols - col : job.rows - row, slow_end = across ? job.rows - row : job.cols - col;
  const int64_t start = row * m.row_stride + col * m.column_stride;
  const int to_fast = across ? 1 : shape.pitch, to_slow = across ? shape.pitch : 1;
  // where an element stands: padding after every kStrip columns
  const auto place = [&](int fast, int slow) {
    return fast * to_fast + slow * to_slow + (across ? fast : slow) / kStrip;
  };
  const int size = m.wide ? 4 : 2, per = 16 / size;
  const auto* memory = static_cast<const unsigned char*>(m.data) + start * size;
  const bool vectors = reinterpret_cast<uintptr_t>(memory) % 16 == 0 && slow_stride * size % 16 == 0 &&
                       fast_end % per == 0 && (across ? m.column_stride : m.row_stride) == 1;
  if (vectors) {
    const int bits_per = m.wide ? 2 : 3;
    for (int i = threadIdx.x; i < kGridElements >> bits_per; i += kGridThreads) {
      const int fast = (i << bits_per) & ((1 << bits_fast) - 1), slow = (i << bits_per) >> bits_fast;
      uint4 v{0, 0, 0, 0};
      if (fast < fast_end && slow < slow_end) {
        v = __ldg(reinterpret_cast<const uint4*>(memory + (slow * slow_stride + fast) * size));
      }
      float y[8];
      const int number = unpacked(v, m.wide != 0, y);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (j < number) tile[place(fast + j, slow)] = y[j];
      }
    }
    return;
  }
#pragma unroll 4
  for (int i = threadIdx.x; i < kGridElements; i += kGridThreads) {
    const int fast = i & ((1 << bits_fast) - 1), slow = i >> bits_fast;
    const int64_t at = start + (across ? slow * m.row_stride + fast * m.column_stride
                                       : fast * m.row_stride + slow * m.column_stride);
    tile[place(fast, slow)] = fast < fast_end && slow < slow_end ? element_of(m, at) : 0.0f;
  }
}

__device__ __forceinline__ void strip_of(const float* tile, const Shape& shape, const Strip& at, float (&y)[kStrip]) {
  const float* from = tile + at.row * shape.pitch + at.col + at.col / kStrip;
#pragma unroll
  for (int i = 0; i < kStrip; ++i) y[i] = from[i];
}

// What the thread `lanes` away shows; `meeting` is where those of other warps do.
__device__ __forceinline__ float other(float value, int lanes, float* meeting) {
  if (lanes < 32) return __shfl_xor_sync(kWarp, value, lanes);
  __syncthreads();
  meeting[threadIdx.x] = value;
  __syncthreads();
  return meeting[threadIdx.x ^ static_cast<unsigned>(lanes)];
}

// Over lanes [from, to) powers of two: the largest magnitude, NaN if one is; the sum in a tree.
__device__ __forceinline__ float largest_of(float found, int from, int to, float* meeting) {
  for (int lanes = from; lanes < to; lanes *= 2) found = max_magnitude(found, other(found, lanes, meeting));
  return found;
}

__device__ __forceinline__ float sum_of(float sum, int to, float* meeting) {
  for (int lanes = 1; lanes < to; lanes *= 2) sum = sum + other(sum, lanes, meeting);
  return sum;
}

// ---- scales ---------------------------------------------------------------------------------------------------------

// What a block stores of its scale, as bits; its value, and what multiplies an element before it is rounded.
struct Chosen {
  uint32_t stored;
  float value, multiplier;
};

__device__ __forceinline__ uint32_t encoded_scale(float raw, int kind) {
  if (kind == kE4M3) return e4m3_nearest(raw);
  if (kind == kUE5M3) return ue5m3_nearest(raw);
  return e4m3_nearest(below(__fdiv_rn(1.0f, raw), 240.0f));
}

__device__ __forceinline__ float decoded_scale(uint32_t byte, int kind) {
  if (kind == kUE5M3) return ue5m3_value(byte);
  const float value = e4m3_value(byte);
  return kind == kInverse ? __fdiv_rn(1.0f, value) : value;
}

// A one-byte scale under an outer one; unit: 1 / S_enc.
__device__ __forceinline__ Chosen scale_under(const GridJob& job, float raw, float unit) {
  Chosen chosen;
  chosen.stored = encoded_scale(raw, job.scale);
  if (job.nonzero && chosen.stored == 0) chosen.stored = 1;
  chosen.value = decoded_scale(chosen.stored, job.scale);
  chosen.multiplier = multiplier_of(chosen.value, unit);
  return chosen;
}

// E8M0 byte for a block's amax, or step, on any grid: numerics.scales._exponent_byte.
__device__ __forceinline__ Chosen power_scale(const GridJob& job, float found) {
  const uint32_t b = bits(found), rest = b & 0x7fffffu;
  const int own = static_cast<int>((b >> 23) & 0xffu);
  int byte = own;
  if (job.rule == kBelow) byte = own - job.exponent;
  if (job.rule == kAbove) byte = own - job.exponent + (rest > job.mantissa);
  if (job.rule == kAboveAmax) byte = own + (rest > 0u);
  if (job.rule == kSpreadNearest) byte = own + (rest > 0x3504f3u);
  byte = byte < 0 ? 0 : (byte > 254 ? 254 : byte);
  byte = own == 255 ? 255 : byte;
  if (job.rule == kAboveAmax) {
    byte -= found * e8m0_reciprocal(static_cast<uint32_t>(byte)) < job.finer && byte > 0;
  }
  Chosen chosen;
  chosen.stored = static_cast<uint32_t>(byte);
  chosen.value = e8m0_value(chosen.stored);
  chosen.multiplier = below(e8m0_reciprocal(chosen.stored) * job.after, kMaxFloat);
  return chosen;
}

// fp32 scales: the amax over v.
__device__ __forceinline__ Chosen float_scale(const GridJob& job, float found) {
  const float step = __fdiv_rn(found, job.v);
  const bool finite = (bits(step) & 0x7fffffffu) < kInfinity;
  const float kept = step == 0.0f ? 1.0f : (finite ? step : not_a_number());
  return {bits(kept), kept, below(__fdiv_rn(1.0f, kept), kMaxFloat)};
}

// The spread of a block times the rule's factor.
__device__ __forceinline__ float spread_step(const GridJob& job, const Shape& shape, const float (&y)[kStrip],
                                             float amax, float* meeting) {
  const uint32_t exponent = (bits(amax) >> 23) & 0xffu;
  const float inverse = e8m0_reciprocal(exponent), n = static_cast<float>(job.block_rows * job.block_cols);
  float z[kStrip];
#pragma unroll
  for (int i = 0; i < kStrip; ++i) z[i] = y[i] * inverse;
  if (job.about_mean) {
    const float mean = __fdiv_rn(sum_of(tree_sum<kStrip>(z), shape.lanes, meeting), n);
#pragma unroll
    for (int i = 0; i < kStrip; ++i) z[i] = z[i] - mean;
  }
#pragma unroll
  for (int i = 0; i < kStrip; ++i) z[i] = z[i] * z[i];
  const float total = sum_of(tree_sum<kStrip>(z), shape.lanes, meeting);
  return __fsqrt_rn(__fdiv_rn(total, n)) * job.factor * e8m0_value(exponent);
}

// S_enc of the strip's block, of amax `found`; the decoder's scales go to job.outers.
__device__ __forceinline__ float outer_scale(const GridJob& job, const Shape& shape, float found, int row, int col,
                                             bool inside, float* meeting) {
  if (job.above == kNothing) return 1.0f;
  float amax = 1.0f;
  int64_t at = 0;
  bool first = inside && row == 0 && col == 0;
  if (job.above == kOfTensor) amax = *job.outer;
  if (job.above == kOfRows) {
    if (inside) amax = job.outer[row];
    at = row;
    first = inside && col == 0;
  }
  if (job.above == kOfTiles) {
    amax = largest_of(found, shape.lanes, job.tile / kStrip, meeting);
    if (amax != amax) amax = floats(kInfinity);
    at = static_cast<int64_t>(row) * (job.cols / job.tile) + col / job.tile;
    first = inside && col % job.tile == 0;
  }
  float s_enc = below(__fdiv_rn(job.numerator, amax), kMaxFloat);
  s_enc = amax == 0.0f || s_enc == 0.0f ? 1.0f : s_enc;
  const bool finite = (bits(amax) & 0x7fffffffu) < kInfinity;
  if (first) job.outers[at] = finite ? __fdiv_rn(1.0f, s_enc) : not_a_number();
  return s_enc;
}

// ---- rounding -------------------------------------------------------------------------------------------------------

// A magnitude (any) -> index of its nearest level, and that level.
__device__ __forceinline__ uint32_t nearest_level(const Grid& grid, float a, bool negative, float& level) {
  if (grid.mantissa) {
    const uint32_t index = fp8_nearest(a, grid.mantissa);
    level = fp8_value(index, grid.mantissa);
    return index;
  }
  int index = 0;
  level = 0.0f;
#pragma unroll
  for (int i = 0; i < kLevels - 1; ++i) {
    const float bound = grid.by_sign && negative ? grid.negative[i] : grid.bounds[i];
    const bool up = !(a <= bound);  // a NaN is above all
    index += up;
    level = up ? grid.levels[i + 1] : level;
  }
  return static_cast<uint32_t>(index < grid.last ? index : grid.last);
}

// The level at or below a magnitude.
struct Below {
  int index;
  float level, inverse_gap, middle;
};

__device__ __forceinline__ Below level_below(const Grid& grid, float a) {
  Below found{0, grid.levels[0], grid.inverse_gaps[0], grid.middles[0]};
#pragma unroll
  for (int i = 0; i < kLevels - 1; ++i) {
    const bool up = !(a < grid.steps[i]);
    found.index += up;
    found.level = up ? grid.levels[i + 1] : found.level;
    found.inverse_gap = up ? grid.inverse_gaps[i + 1] : found.inverse_gap;
    found.middle = up ? grid.middles[i + 1] : found.middle;
  }
  if (found.index > grid.last) found.index = grid.last;
  return found;
}

__device__ __forceinline__ float level_at(const Grid& grid, uint32_t index) {
  float level = grid.levels[0];
#pragma unroll
  for (int i = 1; i < kLevels; ++i) level = index >= static_cast<uint32_t>(i) ? grid.levels[i] : level;
  return level;
}

__device__ __forceinline__ uint32_t by_noise(const Grid& grid, float a, uint32_t noise) {
  const Below found = level_below(grid, a);
  const float distance = (a - found.level) * found.inverse_gap;
  const float threshold = static_cast<float>(noise) * 1.52587890625e-05f + 7.62939453125e-06f;
  return static_cast<uint32_t>(found.index) + (distance > threshold ? 1u : 0u);
}

// The neighbour nearer to `same_way`, which has the sign of the value taken out.
__device__ __forceinline__ uint32_t nearer_to(const Grid& grid, float a, float same_way) {
  const Below found = level_below(grid, a);
  const bool up = same_way > found.middle || (same_way == found.middle && found.index % 2 == 1);
  return static_cast<uint32_t>(found.index) + (up && a > found.level && found.inverse_gap > 0.0f ? 1u : 0u);
}

// Codes of a strip: eight a word where they are packed, else four; the levels of their magnitudes.
struct Codes16 {
  uint32_t words[4];
  float level[kStrip];
};

// `word` with the code of element i.
__device__ __forceinline__ void put(const Grid& grid, Codes16& out, int i, uint32_t index, float u, float y) {
  const uint32_t code = index | (u == u && (bits(y) & kSign) ? grid.sign : 0u);  // a NaN has no sign
  if (grid.packed) {
    out.words[i / 8] |= code << (4 * (i % 8));
  } else {
    out.words[i / 4] |= code << (8 * (i % 4));
  }
}

// Rounds u = y times the scale's multiplier to nearest.
__device__ __forceinline__ void round_nearest(const Grid& grid, const float* y, const float* u, Codes16& out) {
#pragma unroll
  for (int i = 0; i < 4; ++i) out.words[i] = 0;
  if (grid.e2m1) {
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      uint32_t word = e2m1x8_nearest(u + 8 * g, out.level + 8 * g);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const bool lost = u[8 * g + i] != u[8 * g + i];
        word = lost ? (word & ~(15u << (4 * i))) | (7u << (4 * i)) : word;
        out.level[8 * g + i] = lost ? 6.0f : out.level[8 * g + i];
      }
      out.words[g] = word;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kStrip; ++i) {
    const uint32_t index = nearest_level(grid, below(fabsf(u[i]), grid.largest), bits(y[i]) >> 31, out.level[i]);
    put(grid, out, i, index, u[i], y[i]);
  }
}

__device__ __forceinline__ void store_strip(const GridJob& job, const Codes16& codes, int row, int col) {
  if (row >= job.rows || col >= job.cols) return;
  const int bytes = (job.cols - col < kStrip ? job.cols - col : kStrip) / (job.grid.packed ? 2 : 1);
  uint8_t* to = job.codes + row * job.code_stride + (job.grid.packed ? col / 2 : col);
  if (bytes == 8 && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
    *reinterpret_cast<uint2*>(to) = {codes.words[0], codes.words[1]};
  } else if (bytes == kStrip && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    *reinterpret_cast<uint4*>(to) = {codes.words[0], codes.words[1], codes.words[2], codes.words[3]};
  } else {
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      if (i < bytes) to[i] = static_cast<uint8_t>(codes.words[i / 4] >> (8 * (i % 4)));
    }
  }
}

__device__ __forceinline__ void store_chosen(const GridJob& job, const Shape& shape, uint32_t stored, int row, int col,
                                             bool inside) {
  if (!inside || static_cast<int>(threadIdx.x) % shape.lanes != 0) return;
  const int64_t at = static_cast<int64_t>(row / job.block_rows) * (job.cols / job.block_cols) + col / job.block_cols;
  if (job.scale == kFloat32 || job.post_hoc) {
    static_cast<float*>(job.scales)[at] = floats(stored);
  } else {
    static_cast<uint8_t*>(job.scales)[at] = static_cast<uint8_t>(stored);
  }
}

}  // namespace fp4dist
