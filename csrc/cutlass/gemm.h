// Block-scaled FP4 GEMMs that torch does not have: D += alpha A B^T in fp32, and several products at once, each with an
// alpha of its own. No torch header here; CUTLASS's are in gemm.cuh alone.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fp4dist {

// What becomes of alpha A B^T.
enum GemmOutput : int32_t { kAddFloat = 0, kWriteBFloat16 = 1 };

// One product: A [m, k] and B [n, k] as E2M1 codes, two a byte, along k; their scales in tiles of 128 x 4
// (scales.cuh); alpha in device memory; out [m, n] contiguous. k is a multiple of 32, n of 8; everything at 16 bytes.
struct Product {
  const void *a, *b, *a_scales, *b_scales;
  const float* alpha;
  void* out;
  int32_t m, n, k;
};

// The GEMMs of one architecture and format. Products that come together run in one launch. Both return null, or why
// not; `scratch` says how many bytes of device memory, at 256 bytes, the caller lends to `multiply`.
struct Multiplier {
  const char* (*scratch)(GemmOutput output, const Product* products, int32_t number, int64_t* bytes);
  const char* (*multiply)(GemmOutput output, const Product* products, int32_t number, void* scratch,
                          cudaStream_t stream);
};

extern const Multiplier kSm100Nvfp4, kSm100Mxfp4, kSm120Nvfp4, kSm120Mxfp4;

}  // namespace fp4dist
