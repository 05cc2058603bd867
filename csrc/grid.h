// Host entry points of the general quantizer: any grid of at most eight levels, or FP8; any scale format, blocks of 16
// to 256 columns, one scale a row or a tensor, outer scales of the tensor, of rows and of parts of them. What the
// kernels of quantize.h are made for is faster there. No torch header.
#pragma once

#include "jobs.h"

namespace fp4dist {

// The numbers of fp4dist/kernels/cuda/grids.py.
enum GridRule : int32_t {
  kGiven = 0,    // multipliers come with the job
  kOfAmax = 1,   // the block's amax over v
  kBelow = 2,    // powers of two: see fp4dist.numerics.scales
  kAbove = 3,
  kAboveAmax = 4,
  kSpreadBelow = 5,
  kSpreadNearest = 6,
  kSearch = 7,       // of several stretches of the amax's scale the one with the least error
  kCorrected = 8,    // MS-EDEN
};
enum ScaleKind : int32_t { kE4M3 = 0, kE8M0 = 1, kUE5M3 = 2, kInverse = 3, kFloat32 = 4 };
enum Above : int32_t { kNothing = 0, kOfTensor = 1, kOfRows = 2, kOfTiles = 3 };
enum RoundTo : int32_t { kNearestLevel = 0, kByNoise = 1, kTowardAverage = 2 };

constexpr int kLevels = 8;
constexpr int kMostTries = 128;

// An element's grid. Beyond the last level: bounds and steps are infinite, levels and middles those of the last.
struct Grid {
  float bounds[kLevels - 1];    // what a magnitude must exceed to be rounded to the next index
  float negative[kLevels - 1];  // the same for negative values, where ties ask for the sign
  float steps[kLevels - 1];     // levels from the second on
  float levels[kLevels], inverse_gaps[kLevels], middles[kLevels];
  float largest;
  int32_t e2m1;      // E2M1 with ties to even: the conversions of convert.cuh
  int32_t mantissa;  // of FP8 elements, else 0
  int32_t by_sign;   // `negative` differs from `bounds`
  int32_t last;      // index of the largest level
  uint32_t sign;     // the sign bit of a code
  int32_t packed;    // two codes a byte
};

// fp32 or bf16 elements anywhere in memory.
struct Matrix {
  const void* data;
  int64_t row_stride, column_stride;
  int32_t wide;  // fp32
};

struct GridJob {
  Matrix x, toward;  // toward: moving average of x, for kTowardAverage
  int32_t rows, cols;
  const float* given;  // kGiven: multipliers, [rows] or []
  int32_t given_by_row;
  const float* outer;  // kOfTensor, kOfRows: amax of the logical tensor, or of its rows
  int32_t rotation, block_rows, block_cols;
  int32_t rule, scale, above, tile;  // tile: columns under one outer scale
  int32_t nonzero, about_mean, metric, group;  // group: columns that share a correction
  int32_t rounding;
  int32_t tries;          // kSearch: stretches; kCorrected: 2 where 1.5 of the scale is tried as well
  int32_t truncate;       // kCorrected: bits that are cut off a scale in fp32
  int32_t post_hoc;       // kCorrected: codes under fp32 scales; corrected ones stay fp32 for launch_eden_scales
  float numerator, inverse_v, v, before, after, finer, factor;
  int32_t exponent;   // of the grid's maximum, and the bits of its mantissa
  uint32_t mantissa;
  Signs signs;
  Place noise, blocks;  // of elements, in groups of 8; of scales, in blocks, or of the second try's elements
  Grid grid;
  uint8_t* codes;
  int64_t code_stride;  // bytes between rows
  void* scales;         // bytes, or fp32
  float* outers;        // decode scales above the blocks'; post_hoc: bits of the largest corrected one, 0 before
  float stretches[kMostTries];
};

constexpr int64_t kGridIntegers = 66, kGridFloats = 53;  // and a stretch for each try of kSearch

struct GridPointers {
  const void* data;
  const void* toward;
  const void* given;
  const void* outer;
  const void* when;
  void* codes;
  void* scales;
  void* outers;
};

GridJob grid_job_of(const GridPointers& pointers, const int64_t* integers, const double* floats);

// Why no kernel takes the job, or null.
const char* why_not(const GridJob& job);

// Codes, scales and outer scales.
cudaError_t launch_grid(const GridJob& job, cudaStream_t stream);

// Largest magnitude bits of every row (by_row: top [rows]) or of the matrix (top []), in the basis of the codes, into
// `top`, which is zero before.
cudaError_t launch_grid_largest(const GridJob& job, bool by_row, uint32_t* top, cudaStream_t stream);

enum ValueType : int32_t { kValueFloat = 0, kValueBFloat16 = 1, kValueE4M3 = 2, kValueE5M2 = 3 };

// Codes -> values [rows, cols] without gaps: level, times block scale if `scaled`, times factor if fp32. Other types
// take what they hold exactly.
struct GridDecode {
  const uint8_t* codes;
  int64_t code_stride;
  const void* scales;    // of blocks
  const float* factors;  // of tiles
  int32_t rows, cols, block_rows, block_cols, factor_rows, factor_cols;
  int32_t scale, scaled, to, mantissa, packed;
  uint32_t sign;
  float levels[kLevels];
  void* values;
};
constexpr int64_t kDecodeIntegers = 13;
GridDecode grid_decode_of(const void* codes, const void* scales, const void* factors, const int64_t* integers,
                          const double* levels, void* values);
cudaError_t launch_grid_decode(const GridDecode& job, cudaStream_t stream);

}  // namespace fp4dist
