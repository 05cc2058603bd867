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

// Where chunk number `chunk` of 16 bytes of tile row `row` stands: neither rows nor columns meet in a bank; in fp32
// (WIDE) nor do eight lanes that have strips of 32 elements.
template <bool WIDE>
__device__ __forceinline__ int chunk_at(int row, int chunk, int chunks) {
  const int moved = WIDE ? chunk >> 3 & 3 ^ (row & 1) << 2 ^ (row & 2) : 0;
  return row * chunks + (chunk ^ (row >> 4 & 7) ^ moved);
}

// Where the scales of codes are; shifts in place of divisions where blocks have sizes of powers of two.
struct ScalePlaces {
  uint32_t rows, cols, per_row;  // of a block: binary logarithms, if `powers`
  bool powers;

  __device__ __forceinline__ explicit ScalePlaces(const Job& job) {
    rows = static_cast<uint32_t>(job.q_rows);
    cols = static_cast<uint32_t>(job.q_cols);
    per_row = static_cast<uint32_t>(job.rows) / cols;
    powers = ((rows & (rows - 1)) | (cols & (cols - 1))) == 0;
    if (!powers) return;
    rows = 31 - __clz(static_cast<int>(rows));
    cols = 31 - __clz(static_cast<int>(cols));
  }

  // Of the element at (row, col) of memory; POWERS: what `powers` is known to be.
  template <bool POWERS>
  __device__ __forceinline__ uint64_t at(uint32_t row, uint32_t col) const {
    return POWERS ? static_cast<uint64_t>(row >> rows) * per_row + (col >> cols)
                  : static_cast<uint64_t>(row / rows) * per_row + col / cols;
  }
  __device__ __forceinline__ uint64_t anywhere(uint32_t row, uint32_t col) const {
    return powers ? at<true>(row, col) : at<false>(row, col);
  }
};

__device__ __forceinline__ float scale_value(const Job& job, uint32_t byte) {
  return job.source == kCodesE4M3 ? e4m3_value(byte) : e8m0_value(byte);
}

// Whether elements come as fp32 (else bf16).
inline bool is_wide(const Job& job) { return job.source == kFloat || job.back > 1; }

// Whether the memory of codes is of whole groups of `bytes`, aligned to them.
__device__ __forceinline__ bool codes_in(const Job& job, int bytes) {
  return reinterpret_cast<uintptr_t>(job.data) % bytes == 0 && job.stride % bytes == 0 && job.rows % (2 * bytes) == 0;
}

__device__ __forceinline__ const uint8_t* codes_at(const Job& job, int row, int col) {
  return static_cast<const uint8_t*>(job.data) + row * job.stride + col / 2;
}

// Eight codes at (row, col) of memory however it lies; zeros beyond its end.
__device__ __forceinline__ uint32_t codes8(const Job& job, int row, int col) {
  const uint8_t* codes = codes_at(job, row, col);
  uint32_t word = 0;
  for (int i = 0; i < 4 && col + 2 * i < job.rows; ++i) word |= static_cast<uint32_t>(codes[i]) << (8 * i);
  return word;
}

// Fills a bf16 tile with code * scale.
template <int COLUMNS>
__device__ __forceinline__ void fill_from_codes(const Job& job, uint4* tile, int row, int col) {
  constexpr int kChunks = COLUMNS / 8, kRounds = kDepth * kChunks / kThreads;
  const ScalePlaces scales(job);
  const auto put = [&](int i, uint32_t word, uint32_t byte) {
    uint32_t out[4];
    bf16x8_values(word, scale_value(job, byte), out);
    tile[chunk_at<false>(i / kChunks, i % kChunks, kChunks)] = {out[0], out[1], out[2], out[3]};
  };
  if (!codes_in(job, 4) || !scales.powers) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kDepth * kChunks; i += kThreads) {
      const int r = row + i / kChunks, c = col + i % kChunks * 8;
      const bool inside = r < job.cols && c < job.rows;
      put(i, inside ? codes8(job, r, c) : 0u, inside ? job.q_scales[scales.anywhere(r, c)] : 0u);
    }
    return;
  }
  uint32_t words[kRounds] = {}, bytes[kRounds] = {};  // all on their way before the first is waited for
#pragma unroll
  for (int n = 0; n < kRounds; ++n) {
    const int i = n * kThreads + static_cast<int>(threadIdx.x), r = row + i / kChunks, c = col + i % kChunks * 8;
    if (r >= job.cols || c >= job.rows) continue;
    words[n] = __ldg(reinterpret_cast<const uint32_t*>(codes_at(job, r, c)));
    bytes[n] = __ldg(job.q_scales + scales.at<true>(r, c));
  }
#pragma unroll
  for (int n = 0; n < kRounds; ++n) put(n * kThreads + static_cast<int>(threadIdx.x), words[n], bytes[n]);
}

// 32 codes of a row of memory, and their scales. VECTORS: whether they lie as most do, codes aligned and blocks of
// power-of-two sizes.
struct Codes32 {
  uint32_t words[4], bytes[4];

  template <bool VECTORS>
  __device__ __forceinline__ void read(const Job& job, const ScalePlaces& scales, int row, int col) {
    if constexpr (VECTORS) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(codes_at(job, row, col)));
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    } else {
#pragma unroll
      for (int g = 0; g < 4; ++g) words[g] = col + 8 * g < job.rows ? codes8(job, row, col + 8 * g) : 0u;
    }
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      if constexpr (VECTORS) {
        bytes[g] = __ldg(job.q_scales + scales.at<true>(row, col + 8 * g));
      } else {
        bytes[g] = col + 8 * g < job.rows ? job.q_scales[scales.anywhere(row, col + 8 * g)] : 0u;
      }
    }
  }

  __device__ __forceinline__ void get(const Job& job, float factor, float (&y)[32]) const {
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      uint32_t pair[4];
      bf16x2_pairs(words[g], scale_value(job, bytes[g]), pair);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        y[8 * g + i] = floats(pair[i] << 16);
        y[8 * g + i + 4] = floats(pair[i] & 0xffff0000u);
      }
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) y[i] = y[i] * factor;
  }
};

// Fills an fp32 tile with codes' values, turned back from their rotation but for its signs, which are those of columns
// and so left to whoever has one. masks: of the next rotation's signs, a row of memory each, or null; see flips.cuh.
template <int COLUMNS>
__device__ __forceinline__ void fill_turned_back(const Job& job, uint4* tile, int row, int col, const uint32_t* masks,
                                                 int signs) {
  constexpr int kStrips = COLUMNS / 32, kRounds = kDepth * kStrips / kThreads;
  const ScalePlaces scales(job);
  const float factor = *job.q_global;
  const bool vectors = codes_in(job, 16) && scales.powers;
  const auto next = [&](int i) {
    Codes32 codes{};
    const int r = row + i / kStrips, c = col + i % kStrips * 32;
    if (r >= job.cols || c >= job.rows) return codes;
    if (vectors) {
      codes.read<true>(job, scales, r, c);
    } else {
      codes.read<false>(job, scales, r, c);
    }
    return codes;
  };
  Codes32 coming = next(threadIdx.x);
#pragma unroll 1
  for (int n = 0; n < kRounds; ++n) {
    const int i = n * kThreads + static_cast<int>(threadIdx.x);
    const Codes32 codes = coming;
    if (n + 1 < kRounds) coming = next(i + kThreads);
    float y[32];
    codes.get(job, factor, y);
    if (job.back == 16) butterflies<16>(y);
    if (job.back == 32) butterflies<32>(y);
    const uint32_t mask = masks ? masks[(row + i / kStrips) % signs] : 0u;
    const float nth = floats(bits(job.back_nth) ^ (mask & kSign));
#pragma unroll
    for (int j = 0; j < 32; ++j) y[j] = y[j] * nth;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      tile[chunk_at<true>(i / kStrips, i % kStrips * 8 + j, COLUMNS / 4)] = {bits(y[4 * j]), bits(y[4 * j + 1]),
                                                                             bits(y[4 * j + 2]), bits(y[4 * j + 3])};
    }
  }
}

// Fills a tile [kDepth, COLUMNS] of fp32 (WIDE) or bf16 with what lies at (row, col) of memory [job.cols, job.rows];
// zeros outside. Codes that are turned back need fp32; masks, signs: see there. Copies may be under way afterwards.
template <int COLUMNS, bool WIDE>
__device__ __forceinline__ void fill_tile(const Job& job, uint4* tile, int row, int col,
                                          const uint32_t* masks = nullptr, int signs = 1) {
  constexpr int kPer = WIDE ? 4 : 8, kChunks = COLUMNS / kPer, kSize = WIDE ? 4 : 2;
  if (WIDE && job.back > 1) return fill_turned_back<COLUMNS>(job, tile, row, col, masks, signs);
  if (!WIDE && job.source >= kCodesE4M3) return fill_from_codes<COLUMNS>(job, tile, row, col);
  const auto* data = static_cast<const unsigned char*>(job.data);
  const bool vectors =
      reinterpret_cast<uintptr_t>(data) % 16 == 0 && job.stride * kSize % 16 == 0 && job.rows % kPer == 0;
  if (vectors) {
#pragma unroll
    for (int i = threadIdx.x; i < kDepth * kChunks; i += kThreads) {
      const int r = i / kChunks, c = i % kChunks * kPer;
      const bool inside = row + r < job.cols && col + c < job.rows;
      const void* from = inside ? data + ((row + r) * job.stride + col + c) * kSize : data;
      copy_async16(&tile[chunk_at<WIDE>(r, i % kChunks, kChunks)], from, inside);
    }
    return;
  }
  for (int i = threadIdx.x; i < kDepth * COLUMNS; i += kThreads) {
    const int r = i / COLUMNS, c = i % COLUMNS;
    const bool inside = row + r < job.cols && col + c < job.rows;
    const float value = inside ? element<WIDE>(job.data, (row + r) * job.stride + col + c) : 0.0f;
    const int place = chunk_at<WIDE>(r, c / kPer, kChunks) * kPer + c % kPer;
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
    y[i] = element<WIDE>(tile, chunk_at<WIDE>(row + i, column / kPer, COLUMNS / kPer) * kPer + column % kPer);
  }
}

// L words of the columns `column` (an even one) and `column` + 1 of a bf16 tile.
template <int L, int COLUMNS>
__device__ __forceinline__ void tile_columns(const uint4* tile, int row, int column, uint32_t (&words)[L]) {
#pragma unroll
  for (int i = 0; i < L; ++i) {
    const int chunk = chunk_at<false>(row + i, column / 8, COLUMNS / 8);
    words[i] = reinterpret_cast<const uint32_t*>(tile)[chunk * 4 + column % 8 / 2];
  }
}

// L elements of a row of a bf16 tile, as vectors.
template <int L, int COLUMNS>
__device__ __forceinline__ void tile_row(const uint4* tile, int row, int strip, uint4 (&v)[L / 8]) {
#pragma unroll
  for (int i = 0; i < L / 8; ++i) v[i] = tile[chunk_at<false>(row, strip * (L / 8) + i, COLUMNS / 8)];
}

}  // namespace fp4dist
