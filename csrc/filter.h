// Host entry points of how gradients pass a quantizer that clips, H^-1 (M * (H g)), and of values that are turned back
// from a rotated basis; the bits of fp4dist/numerics/estimators.py and `original`. No torch header.
#pragma once

#include "grid.h"

namespace fp4dist {

// Rows are contiguous, of a multiple of 16 columns and of the rotation.
struct RowMajor {
  const void* data;
  int64_t stride;  // elements
  int32_t wide;    // fp32, else bf16
};

struct Filter {
  RowMajor g;            // the gradient; null for `launch_mask`
  const uint16_t* kept;  // [rows, cols / 16] bits M; null: made again from x
  RowMajor x;
  const void* scales;  // [rows / block_rows, cols / block_cols] of x's codes
  const float* outer;  // [] or [rows / outer_rows, cols / outer_cols]
  int32_t rows, cols, block_rows, block_cols, outer_rows, outer_cols;
  int32_t scale;   // enum ScaleKind
  int32_t powers;  // the multiplier is after / scale, of x times before; else 1 / (scale outer)
  int32_t rotation;
  float before, after, largest;  // largest: the end of the grid
  float inverse;                 // 1 / rotation
  Signs signs;
  void* out;  // [rows, cols] without gaps, of bits for `launch_mask`
  int32_t wide_out, add;  // fp32 (else bf16); the result is added to what is there
};

constexpr int64_t kFilterIntegers = 25, kFilterFloats = 4;

struct FilterPointers {
  const void* g;
  const void* kept;
  const void* x;
  const void* scales;
  const void* outer;
  const void* when;
  void* out;
};

Filter filter_of(const FilterPointers& pointers, const int64_t* integers, const double* floats);

// M of x as bits, an element's in the place of its column.
cudaError_t launch_mask(const Filter& job, cudaStream_t stream);

cudaError_t launch_filter(const Filter& job, cudaStream_t stream);

// E2M1 codes [rows, cols / 2 bytes] at `x` (aligned to 8 bytes), one outer scale -> values in the original basis.
// inverse: 1 / rotation
cudaError_t launch_turn_back(const Filter& job, cudaStream_t stream);

}  // namespace fp4dist
