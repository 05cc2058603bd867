// Reading: rows as they lie in memory, and tiles in shared memory for whoever needs columns.
#pragma once

#include "block.cuh"

namespace fp4dist {

constexpr int kThreads = 256;
constexpr int kDepth = 128;  // rows of a tile in memory: elements of the contracted dimension

template <bool WIDE>
__device__ __forceinline__ float element(const void* data, int64_t i) {
  if constexpr (WIDE) return static_cast<const float*>(data)[i];
  return floats(static_cast<uint32_t>(static_cast<const uint16_t*>(data)[i]) << 16);
}

__device__ __forceinline__ void two_floats(uint32_t word, float* y) {
  y[0] = floats(word << 16);
  y[1] = floats(word & 0xffff0000u);
}

// 16 bytes -> four fp32 or eight bf16.
template <bool WIDE>
__device__ __forceinline__ void unpack(const uint4& v, float* y) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (WIDE) {
      y[i] = floats(words[i]);
    } else {
      two_floats(words[i], y + 2 * i);
    }
  }
}

// L elements of a row that is contiguous in memory, as they are there: of fp32 (WIDE) or bf16.
template <int L, bool WIDE>
struct Row {
  static constexpr int kSize = WIDE ? 4 : 2, kVectors = L * kSize / 16;
  uint4 vectors[kVectors];

  __device__ __forceinline__ void read(const void* data, int64_t start) {
    const auto* place = static_cast<const unsigned char*>(data) + start * kSize;
    if (reinterpret_cast<uintptr_t>(place) % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) vectors[i] = __ldg(reinterpret_cast<const uint4*>(place) + i);
    } else {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        vectors[i] = {word(place, 4 * i), word(place, 4 * i + 1), word(place, 4 * i + 2), word(place, 4 * i + 3)};
      }
    }
  }

  __device__ __forceinline__ void get(float (&y)[L]) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) unpack<WIDE>(vectors[i], &y[i * 16 / kSize]);
  }

 private:
  // Word number i of memory that is aligned to elements only.
  static __device__ __forceinline__ uint32_t word(const unsigned char* place, int i) {
    if constexpr (WIDE) return reinterpret_cast<const uint32_t*>(place)[i];
    const auto* halves = reinterpret_cast<const uint16_t*>(place) + 2 * i;
    return halves[0] | static_cast<uint32_t>(halves[1]) << 16;
  }
};

// Where chunk number `chunk` of 16 bytes of tile row `row` stands: neither rows nor columns meet in a bank.
__device__ __forceinline__ int chunk_at(int row, int chunk, int chunks) {
  return row * chunks + (chunk ^ ((row >> 4) & 7));
}

__device__ __forceinline__ float code_scale(const Job& job, int row, int col) {
  const uint32_t byte =
      job.q_scales[static_cast<int64_t>(row / job.q_rows) * (job.rows / job.q_cols) + col / job.q_cols];
  return job.source == kCodesE4M3 ? e4m3_value(byte) : e8m0_value(byte);
}

// Whether elements come as fp32 (else bf16).
inline bool is_wide(const Job& job) { return job.source == kFloat || job.back > 1; }

// Eight codes at (row, col) of memory as bf16 code * scale.
__device__ __forceinline__ uint4 decoded8(const Job& job, int row, int col) {
  const auto* codes = static_cast<const uint8_t*>(job.data) + row * job.stride + col / 2;
  uint32_t word = 0;
  if (col + 8 <= job.rows && reinterpret_cast<uintptr_t>(codes) % 4 == 0) {
    word = __ldg(reinterpret_cast<const uint32_t*>(codes));
  } else {
    for (int i = 0; i < 4 && col + 2 * i < job.rows; ++i) word |= static_cast<uint32_t>(codes[i]) << (8 * i);
  }
  const float scale = code_scale(job, row, col);
  float value[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) value[i] = e2m1_value(word << (28 - 4 * i)) * scale;
  return {bf16x2_exact(value[0], value[1]), bf16x2_exact(value[2], value[3]), bf16x2_exact(value[4], value[5]),
          bf16x2_exact(value[6], value[7])};
}

// 32 codes at (row, col) of memory -> their values over the root of their rotation.
__device__ __forceinline__ void turned_back_codes(const Job& job, int row, int col, float (&y)[32]) {
  const auto* codes = static_cast<const uint8_t*>(job.data) + row * job.stride + col / 2;
  const float factor = *job.q_global * job.back_root;
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    uint32_t word = 0;
    float scale = 0.0f;
    if (col + 8 * g < job.rows) {
      scale = code_scale(job, row, col + 8 * g);
#pragma unroll
      for (int i = 0; i < 4; ++i) word |= static_cast<uint32_t>(codes[4 * g + i]) << (8 * i);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) y[8 * g + i] = e2m1_value(word << (28 - 4 * i)) * scale * factor;
  }
}

// Fills a tile [kDepth, COLUMNS] of fp32 (WIDE) or bf16 with what lies at (row, col) of memory [job.cols, job.rows];
// zeros outside. Codes that are turned back need fp32. Copies may still be under way afterwards.
template <int COLUMNS, bool WIDE>
__device__ __forceinline__ void fill_tile(const Job& job, uint4* tile, int row, int col) {
  constexpr int kPer = WIDE ? 4 : 8, kChunks = COLUMNS / kPer, kSize = WIDE ? 4 : 2;
  if (WIDE && job.back > 1) {
    for (int i = threadIdx.x; i < kDepth * (COLUMNS / 32); i += kThreads) {
      const int r = i / (COLUMNS / 32), c = i % (COLUMNS / 32) * 32;
      float y[32] = {};
      if (row + r < job.cols && col + c < job.rows) {
        turned_back_codes(job, row + r, col + c, y);
        if (job.back == 16) butterflies<16>(y);
        if (job.back == 32) butterflies<32>(y);
      }
#pragma unroll
      for (int j = 0; j < 32; ++j) y[j] = y[j] * job.back_root;
      flip(y, job.back_signs);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        tile[chunk_at(r, c / 4 + j, kChunks)] = {bits(y[4 * j]), bits(y[4 * j + 1]), bits(y[4 * j + 2]),
                                                 bits(y[4 * j + 3])};
      }
    }
    return;
  }
  if (!WIDE && job.source >= kCodesE4M3) {
    for (int i = threadIdx.x; i < kDepth * kChunks; i += kThreads) {
      const int r = i / kChunks, c = i % kChunks * 8;
      const bool inside = row + r < job.cols && col + c < job.rows;
      tile[chunk_at(r, i % kChunks, kChunks)] = inside ? decoded8(job, row + r, col + c) : uint4{0, 0, 0, 0};
    }
    return;
  }
  const auto* data = static_cast<const unsigned char*>(job.data);
  const bool vectors =
      reinterpret_cast<uintptr_t>(data) % 16 == 0 && job.stride * kSize % 16 == 0 && job.rows % kPer == 0;
  if (vectors) {
#pragma unroll
    for (int i = threadIdx.x; i < kDepth * kChunks; i += kThreads) {
      const int r = i / kChunks, c = i % kChunks * kPer;
      const bool inside = row + r < job.cols && col + c < job.rows;
      const void* from = inside ? data + ((row + r) * job.stride + col + c) * kSize : data;
      copy_async16(&tile[chunk_at(r, i % kChunks, kChunks)], from, inside);
    }
    return;
  }
  for (int i = threadIdx.x; i < kDepth * COLUMNS; i += kThreads) {
    const int r = i / COLUMNS, c = i % COLUMNS;
    const bool inside = row + r < job.cols && col + c < job.rows;
    const float value = inside ? element<WIDE>(job.data, (row + r) * job.stride + col + c) : 0.0f;
    const int place = chunk_at(r, c / kPer, kChunks) * kPer + c % kPer;
    if constexpr (WIDE) {
      reinterpret_cast<float*>(tile)[place] = value;
    } else {
      reinterpret_cast<uint16_t*>(tile)[place] = static_cast<uint16_t>(bits(value) >> 16);
    }
  }
}

// L elements of a column of a tile, from `row` (a multiple of 16) on.
template <int L, int COLUMNS, bool WIDE>
__device__ __forceinline__ void tile_column(const uint4* tile, int row, int column, float (&y)[L]) {
  constexpr int kPer = WIDE ? 4 : 8;
#pragma unroll
  for (int i = 0; i < L; ++i) {
    y[i] = element<WIDE>(tile, chunk_at(row + i, column / kPer, COLUMNS / kPer) * kPer + column % kPer);
  }
}

// L elements of a row of a bf16 tile.
template <int L, int COLUMNS>
__device__ __forceinline__ void tile_row(const uint4* tile, int row, int strip, float (&y)[L]) {
#pragma unroll
  for (int i = 0; i < L / 8; ++i) {
    unpack<false>(tile[chunk_at(row, strip * (L / 8) + i, COLUMNS / 8)], &y[8 * i]);
  }
}

}  // namespace fp4dist
