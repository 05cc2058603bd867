// What the kernels need beside CUDA's own language: a launch that a host compiler can parse, and copies to shared
// memory. Under a host compiler (no nvcc) tests/cuda/emulator provides CUDA's built-ins, and these as well.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#ifdef __CUDACC__

#define FP4DIST_LAUNCH(kernel, blocks, threads, shared, stream, ...) \
  kernel<<<(blocks), (threads), (shared), (stream)>>>(__VA_ARGS__)
#define FP4DIST_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace fp4dist {

// 16 bytes, global -> shared, without passing through registers; zeros where `inside` is false.
__device__ __forceinline__ void copy_async16(void* shared, const void* global, bool inside) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(global), "r"(inside ? 16 : 0)
      : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Global memory on its way to the L2 cache, 32 bytes.
__device__ __forceinline__ void fetch_ahead(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// max of |a| and |b|; NaN if one is.
__device__ __forceinline__ float max_magnitude(float a, float b) {
  float found;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(found) : "f"(fabsf(a)), "f"(fabsf(b)));
  return found;
}

// The smaller of two; NaN if one is.
__device__ __forceinline__ float at_most(float a, float limit) {
  float found;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(found) : "f"(a), "f"(limit));
  return found;
}

}  // namespace fp4dist

#else
#include "emulator.h"
#endif
