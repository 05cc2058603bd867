// Host entry points of the quantizers. As amax.h: no torch header is included here or in any .cu file.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fp4dist {

// How the source lies in memory. Codes are E2M1, two a byte, under scales of one byte.
enum Source : int32_t { kBFloat16 = 0, kFloat = 1, kCodesE4M3 = 2, kCodesE8M0 = 3 };

// Which scale a block gets; the numbers are those of fp4dist/kernels/cuda/jobs.py.
enum Rule : int32_t {
  kAmax = 0,   // E4M3 of the block's amax
  kFloor = 1,  // E8M0: powers of two, see fp4dist.numerics.scales
  kCeil = 2,
  kCeilAmax = 3,
  kQuestFloor = 4,
  kQuestNearest = 5,
  kFourOverSix = 6,  // E4M3: the better of the amax's scale and 1.5 of it
  kEden = 7,         // MS-EDEN: corrected scales stay fp32 for launch_eden_scales
  kMeasure = 8,      // no codes: the largest magnitude bits, into `top`
};

// Where noise comes from: see fp4dist/numerics/rng.py. Positions are counted in groups of columns (8, or a block).
struct Place {
  uint32_t keys[20];            // of the ten rounds: launches pass them on, so that no thread keeps them in registers
  uint32_t c1, c2, c3;          // counter words, the first two unless `when` gives them
  const uint32_t* when;         // [2] micro-batch and step in device memory, or null
  uint32_t width;               // groups in a row of the whole operand
  uint32_t row_run, r0, r1;     // rows of a run of this shard, where the first and the second run begin
  uint32_t column_run, q0, q1;  // likewise groups
};

// Signs of a rotation: 0 none; 1 the bits of `words`, a set bit flips; 2 the draw at index 0 of `place`.
struct Signs {
  int32_t mode;
  uint32_t words[4];
  Place place;
};

// One matrix to quantize, [rows, cols] in the output's orientation.
struct Job {
  // the source; turned: memory holds the transpose. stride: elements (of codes: bytes) between rows of memory
  const void* data;
  int64_t stride;
  int32_t source, turned, rows, cols;
  const uint8_t* q_scales;  // of codes: scales of blocks [q_rows, q_cols] of memory, and the tensor's scale
  const float* q_global;
  int32_t q_rows, q_cols;
  int32_t back;         // size of the rotation that codes are turned back from, 1 for none
  uint32_t back_signs;  // its signs, repeated to 32 bits
  float back_nth;       // 1 / back
  // the quantizer
  int32_t rule, noisy, rotation, block_rows, block_cols;
  int32_t metric;      // of four-over-six: 0 mse, 1 mae, 2 absmax
  int32_t about_mean;  // quest: the standard deviation, else the root mean square
  int32_t nonzero;     // E4M3 scales are at least the smallest
  float numerator;     // budget * v
  float inverse_v, v;
  float before;  // floor: what multiplies an element before its scale does
  float finer;   // ceil of the amax: below this share of the scale the next smaller one is taken; 0: never
  float factor;  // quest
  Signs signs;
  Place noise;
  const uint32_t* outer;  // bits of the logical tensor's amax
  // outputs; null where not wanted
  uint32_t* codes;      // [rows, cols / 8] words of eight codes
  void* scales;         // [rows / block_rows, cols / block_cols] bytes; of MS-EDEN fp32
  uint32_t* values;     // [rows, cols / 2] words of two bf16: code * block scale; narrow: four FP8 a word
  uint32_t* top;        // zero before: the largest byte of power-of-two scales, MS-EDEN's largest scale, an amax
  uint32_t* memory;     // narrow: enum Memory of decode.h, of which `top` is one
  uint32_t* kept;       // of power-of-two scales: [rows, cols / 32] words, a bit for each element that is not clipped
  float* global_scale;  // the tensor's decode scale, of rules with an amax
  int32_t swizzled;     // scales in 128 x 4 tiles as tcgen05 reads them, rows of a block repeated; else as above
  int32_t narrow;       // of power-of-two scales: enum Carrier of FP8 `values` at the shift that `memory` says (without
                        // codes: rule kCeil, or kFloor with `before` below 7/8), or kMisfitsAlone, or 0
};

// Fills the outputs of a job on `stream`; cudaErrorInvalidValue where the combination was not built (see `supported`).
cudaError_t launch_quantize(const Job& job, cudaStream_t stream);

// The same for x and for its transpose from one reading of a bf16 matrix. column.data, stride: those of row.
cudaError_t launch_quantize_pair(const Job& row, const Job& column, cudaStream_t stream);

// Whether a job's quantizer, or the pair's, was built.
bool supported(const Job& job);
bool supported_pair(const Job& row, const Job& column);

// MS-EDEN once the largest corrected scale is known: `number` fp32 scales / S_dec -> E4M3, stochastically.
struct EdenScales {
  const float* corrected;
  const uint32_t* largest;  // bits
  const uint32_t* codes;    // of blocks of 16; for `values`
  int64_t number;
  int32_t blocks;  // of a row
  float budget;
  Place noise;       // groups: blocks
  uint8_t* scales;   // null where not wanted
  uint32_t* values;  // bf16 pairs; null where not wanted
  float* global_scale;
  int32_t swizzled;
};
cudaError_t launch_eden_scales(const EdenScales& job, cudaStream_t stream);

}  // namespace fp4dist
