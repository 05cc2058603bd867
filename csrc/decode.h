// Host entry points of what reads codes: no arithmetic beyond exact products. No torch header.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fp4dist {

enum Carrier : int32_t { kToFloat = 0, kToBFloat16 = 1, kToE5M2 = 2, kToE4M3 = 3 };

// Job.narrow of a quantizer that follows one of FP8 values alone: codes and scales, of matrices that did not fit alone.
constexpr int32_t kMisfitsAlone = 4;

// E2M1 codes [rows, cols / 2 bytes] in memory, under one-byte scales of blocks [block_rows, block_cols].
struct Codes {
  const uint8_t* codes;
  const uint8_t* scales;
  const float* global_scale;
  int32_t e8m0;  // else E4M3
  int32_t rows, cols, block_rows, block_cols;
};

// What a quantizer of power-of-two scales remembers of a slot: eight numbers, zeros before the first matrix.
// kLargestBefore: the largest scale byte of the matrix before;  kLargest: of this one;  kMisfits: not 0 if this one did
// not fit into FP8 at the shift that follows from it;  kLost: elements of this one that FP8 cut;  the rest is 0 between
// matrices.
enum Memory : int32_t { kLargestBefore = 0, kLargest = 1, kMisfits = 2, kLost = 3, kArrived = 4, kCounting = 5 };
constexpr uint32_t kHeadroom = 3;  // binades by which the largest scale may grow until a matrix is written twice

// Values of the codes, or (turned) of their transpose: kToFloat all of it times `factor`; kToBFloat16 code * scale; FP8
// code * scale * 2^shift, where the largest byte, at `top`, goes to the top of the type's range.
// scale: [] the factor of all FP8 values;  lost: [] zero before, elements that FP8 cuts towards 0
// memory: where a quantizer has written `values` in FP8 itself, and only misfits are decoded; then `lost` becomes the
// most so far
struct Decode {
  Codes from;
  int32_t to, turned;
  float factor;
  const uint32_t* top;
  void* values;
  float* scale;
  uint32_t* lost;
  uint32_t* memory;
};
cudaError_t launch_decode(const Decode& job, cudaStream_t stream);

// The largest byte below 255 of `number` bytes, into `top`, which is zero before.
cudaError_t launch_largest_byte(const uint8_t* scales, int64_t number, uint32_t* top, cudaStream_t stream);

// Scales [rows, cols] in order -> tiles of 128 x 4 (scales.cuh), each row `repeat` times; 0 where the tiles reach
// beyond.
cudaError_t launch_swizzle(const uint8_t* scales, int32_t rows, int32_t cols, int32_t repeat, uint8_t* out,
                           cudaStream_t stream);

}  // namespace fp4dist
