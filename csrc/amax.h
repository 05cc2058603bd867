// Host entry points of the device code. No torch header is included here or in any .cu file, so that
// `nvcc -cubin` compiles the kernels on a machine without a CUDA build of torch; bindings.cpp joins the two.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fp4dist {

enum class FloatType { kBFloat16, kHalf, kFloat };

// Writes max |x[i]| of the `numel` >= 1 elements at `x` to the fp32 scalar `out`, both in device memory, on `stream`.
// A NaN anywhere gives NaN, else an infinity gives +inf. Any address that is aligned to the element is accepted.
// Deterministic: the result depends neither on the order of the threads nor on the launch shape.
// Nothing is allocated and nothing synchronizes, so the call can be captured in a CUDA graph.
cudaError_t launch_amax(const void* x, int64_t numel, FloatType type, float* out, cudaStream_t stream);

}  // namespace fp4dist
