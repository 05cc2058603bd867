// max |x| of a tensor, computed on integers.
//
// For floats without their sign bit, the order of the values is the order of the bit patterns taken as unsigned
// integers, and every NaN pattern is above infinity. An integer maximum therefore propagates NaN and Inf as
// torch.amax(torch.abs(x)) does, never rounds, and gives the same bits in any order, which makes atomicMax
// deterministic. 16-bit types are handled two to a word by the SIMD maximum.
//
// The cost is one read of x: 16-byte loads over the aligned middle, single elements at the two ragged ends.

#include "amax.h"

#include <cuda_fp16.h>

#include "portable.cuh"

namespace fp4dist {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // 16-byte loads in flight for each thread
constexpr int kBlocksPerSm = 8;

// A Lane type says how one element's pattern is stored, how two 32-bit words of patterns are maximized
// (lane by lane), and what fp32 pattern a pattern of |x| stands for; the last is monotone, NaN included.

struct WordLane {
  using Element = uint32_t;
  static constexpr uint32_t kMagnitude = 0x7fffffffu;
  static __device__ uint32_t max_words(uint32_t a, uint32_t b) { return max(a, b); }
  static __device__ uint32_t fold(uint32_t word) { return word; }
};

struct HalfwordLane {
  using Element = uint16_t;
  static constexpr uint32_t kMagnitude = 0x7fff7fffu;
  static __device__ uint32_t max_words(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }
  static __device__ uint32_t fold(uint32_t word) { return max(word & 0xffffu, word >> 16); }
};

struct FloatBits : WordLane {
  static __device__ uint32_t to_fp32(uint32_t bits) { return bits; }
};

struct BFloat16Bits : HalfwordLane {
  static __device__ uint32_t to_fp32(uint32_t bits) { return bits << 16; }
};

struct HalfBits : HalfwordLane {
  static __device__ uint32_t to_fp32(uint32_t bits) {
    return __float_as_uint(__half2float(__ushort_as_half(static_cast<uint16_t>(bits)))) & 0x7fffffffu;
  }
};

template <typename Bits>
__device__ uint32_t max_vector(uint32_t running, uint4 v) {
  const uint32_t ab = Bits::max_words(v.x & Bits::kMagnitude, v.y & Bits::kMagnitude);
  const uint32_t cd = Bits::max_words(v.z & Bits::kMagnitude, v.w & Bits::kMagnitude);
  return Bits::max_words(running, Bits::max_words(ab, cd));
}

// Elements [0, head) and [tail, numel) are ragged; `body` holds the `vectors` aligned 16-byte vectors between them.
template <typename Bits>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    amax_kernel(const typename Bits::Element* __restrict__ x, int64_t numel, int64_t head, int64_t vectors,
                uint32_t* __restrict__ out) {
  constexpr int64_t kPerVector = 16 / sizeof(typename Bits::Element);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t tail = head + vectors * kPerVector;
  const uint4* __restrict__ body = reinterpret_cast<const uint4*>(x + head);

  uint32_t running = 0;
  int64_t i = thread;
  for (; i + (kUnroll - 1) * threads < vectors; i += kUnroll * threads) {
    uint4 v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) v[u] = __ldg(body + i + u * threads);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) running = max_vector<Bits>(running, v[u]);
  }
  for (; i < vectors; i += threads) running = max_vector<Bits>(running, __ldg(body + i));

  uint32_t bits = Bits::fold(running);
  // both ends are shorter than one vector when there is a body; without one, the head may be the whole tensor
  for (int64_t j = thread; j < head; j += threads) bits = max(bits, static_cast<uint32_t>(x[j]) & Bits::kMagnitude);
  for (int64_t j = tail + thread; j < numel; j += threads) {
    bits = max(bits, static_cast<uint32_t>(x[j]) & Bits::kMagnitude);
  }

  __shared__ uint32_t warps[kThreads / 32];
  bits = __reduce_max_sync(0xffffffffu, Bits::to_fp32(bits));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = bits;
  __syncthreads();
  if (threadIdx.x < 32) {
    bits = __reduce_max_sync(0xffffffffu, threadIdx.x < kThreads / 32 ? warps[threadIdx.x] : 0u);
    if (threadIdx.x == 0) atomicMax(out, bits);
  }
}

template <typename Bits>
cudaError_t launch(const void* data, int64_t numel, float* out, cudaStream_t stream) {
  using Element = typename Bits::Element;
  constexpr int64_t kPerVector = 16 / sizeof(Element);
  const auto* x = static_cast<const Element*>(data);
  const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) % 16 / sizeof(Element));
  const int64_t ragged = past == 0 ? 0 : kPerVector - past;
  const int64_t head = ragged < numel ? ragged : numel;
  const int64_t vectors = (numel - head) / kPerVector;

  int device = 0;
  int processors = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) {
    return error;
  }
  // the integer 0 is the fp32 0, the smallest |x|; a memset node keeps the call capturable
  if (const cudaError_t error = cudaMemsetAsync(out, 0, sizeof(float), stream)) return error;

  const int64_t work = (vectors + kThreads - 1) / kThreads;
  const int64_t most = static_cast<int64_t>(processors) * kBlocksPerSm;
  const auto blocks = static_cast<unsigned>(work < 1 ? 1 : (work < most ? work : most));
  const auto kernel = &amax_kernel<Bits>;
  FP4DIST_LAUNCH(kernel, blocks, kThreads, 0, stream, x, numel, head, vectors, reinterpret_cast<uint32_t*>(out));
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_amax(const void* x, int64_t numel, FloatType type, float* out, cudaStream_t stream) {
  switch (type) {
    case FloatType::kBFloat16:
      return launch<BFloat16Bits>(x, numel, out, stream);
    case FloatType::kHalf:
      return launch<HalfBits>(x, numel, out, stream);
    case FloatType::kFloat:
      return launch<FloatBits>(x, numel, out, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fp4dist
