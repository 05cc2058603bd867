// Host entry points of what is taken out of operands before they become codes (fp4dist/numerics/splits.py), of slopes
// (fp4dist/numerics/estimators.py), and of fp32 as three bf16. No torch header.
#pragma once

#include "filter.h"

namespace fp4dist {

// Of x, zero where chosen in `rest`, and the chosen in `side`, zero elsewhere; both without gaps, in x's type.
struct Take {
  const void* x;  // [rows, cols]: rows contiguous, or (turned) columns
  int64_t stride;
  int32_t wide, turned;  // wide: fp32, else bf16
  int32_t rows, cols;    // cols: a multiple of 16, with mx of 32
  const uint8_t* chosen;  // [cols], or [rows] (by_row); null: all are, and there is no rest
  int32_t by_row;
  int32_t mx;  // the side in MXFP8, whose values x's type holds
  void* rest;
  void* side;
};

// What x has more than its E2M1 codes, in chosen columns; elsewhere zero. In x's type.
struct Residual {
  RowMajor x;
  const void* codes;  // [rows, cols / 2 bytes]
  const uint8_t* scales;
  const float* outer;  // one for all
  const uint8_t* chosen;  // [cols]
  int32_t rows, cols, block_rows, block_cols;  // cols, block_cols: multiples of 16
  int32_t scale;  // kE4M3 or kE8M0
  void* side;
};

constexpr int kLongestClamp = 16384;

// bf16 rows between their `wanted`-th smallest and `wanted`-th largest element; side: what is cut off, or null.
struct Clamp {
  const uint16_t* x;
  int64_t stride;
  int32_t rows, cols, wanted;
  uint16_t* rest;
  uint16_t* side;
};

constexpr int kLongestGroup = 256;

// The k largest magnitudes of each group of a bf16 row, the first of equals, in `side`; the others in `rest`.
struct Largest {
  const uint16_t* x;
  int64_t stride;
  int32_t rows, cols, group, k;  // group: a power of two from 8 to 256
  uint16_t* rest;
  uint16_t* side;
};

constexpr int kMostLevels = 16;

// |2 (z - l) / d - 1| of the bin [l, l + d) that z = |u| lies in; infinite beyond the last level, and of NaN.
struct Offsets {
  const float* u;
  double* out;
  int64_t count;
  double levels[kMostLevels];
  int32_t last;  // index of the largest level
};

// fp32 as the sum of three bf16, each the nearest to what those before leave.
struct Terms {
  const float* x;
  uint16_t* terms[3];
  int64_t count;
};

// cudaErrorInvalidValue for sizes that a kernel lacks.
cudaError_t launch_take(const Take& job, cudaStream_t stream);
cudaError_t launch_residual(const Residual& job, cudaStream_t stream);
cudaError_t launch_clamp(const Clamp& job, cudaStream_t stream);
cudaError_t launch_largest(const Largest& job, cudaStream_t stream);
cudaError_t launch_offsets(const Offsets& job, cudaStream_t stream);
cudaError_t launch_terms(const Terms& job, cudaStream_t stream);

}  // namespace fp4dist
