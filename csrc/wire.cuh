// The wire codec on the device: a block of threads has a record in its registers, L elements a thread, so that the
// record's scale is known before a byte is written and its tag is summed from what the threads hold.
#pragma once

#include "round.cuh"
#include "wire_vectors.cuh"

namespace fp4dist {

constexpr int kWireThreads = 512, kWireWarps = kWireThreads / 32;

// Elements of a thread: 16; of long records 32, or they would not fit into a block of threads.
inline int wire_run(int chunk) { return chunk <= 4096 ? 16 : 32; }

// ---- exchanges within a block of threads ----------------------------------------------------------------------------

// Where warps meet: two places in turn, so that one barrier an exchange is enough. Whoever writes a place again has
// passed the barrier of the exchange between, before which all had read it.
struct Meeting {
  uint32_t* parts;  // [2 * kWireWarps], shared
  uint32_t turn;

  // What each warp shows, at lane number warp; 0 beyond.
  __device__ __forceinline__ uint32_t of_warps(uint32_t mine) {
    uint32_t* here = parts + turn * kWireWarps;
    turn ^= 1;
    const uint32_t lane = threadIdx.x % 32;
    if (lane == 0) here[threadIdx.x / 32] = mine;
    __syncthreads();
    return lane < blockDim.x / 32 ? here[lane] : 0u;
  }
};

__device__ __forceinline__ uint32_t max_of_block(uint32_t mine, Meeting& meeting) {
  const uint32_t found = __reduce_max_sync(kWarp, mine);
  return blockDim.x == 32 ? found : __reduce_max_sync(kWarp, meeting.of_warps(found));
}

__device__ __forceinline__ uint32_t sum_of_block(uint32_t mine, Meeting& meeting) {
  const uint32_t found = __reduce_add_sync(kWarp, mine);
  return blockDim.x == 32 ? found : __reduce_add_sync(kWarp, meeting.of_warps(found));
}

// ---- rotation -------------------------------------------------------------------------------------------------------

// The 32 signs that a thread's elements are among, from bit 0 of its first one on.
template <int L>
__device__ __forceinline__ uint32_t wire_signs(const Place& place, uint32_t rank, int rotation) {
  if (rotation == 1) return 0;
  const Words drawn = draw(place, {rank, place.c2}, 0);
  const uint32_t at = threadIdx.x * L % static_cast<uint32_t>(rotation), which = at / 32;
  const uint32_t word = which == 0 ? drawn.w[0] : which == 1 ? drawn.w[1] : which == 2 ? drawn.w[2] : drawn.w[3];
  return word >> (at % 32);
}

template <int L>
__device__ __forceinline__ void wire_rotate(int rotation, float (&y)[L]) {
  if (rotation > 1) butterflies<32>(y);
  if (rotation > 32) butterflies<128, L, 32>(y);
}

// ---- records --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t mix(uint32_t value, uint32_t index) {
  uint32_t v = value ^ (index * 0x9e3779b9u);
  v *= 0x85ebca6bu;
  return (v ^ (v >> 15)) * 0xc2b2ae35u;
}

__device__ __forceinline__ uint32_t mixed_header(uint32_t w0, uint32_t w1, uint32_t w2) {
  return mix(w0, 0x1000000u) + mix(w1, 0x1000001u) + mix(w2, 0x1000002u);
}

// How a thread's L elements lie in a record: code words, and scale bytes, of which a pair of threads may share one.
template <int KIND, int L>
struct Wire {
  static constexpr int kWords = KIND == kWireFp8 ? L / 4 : L / 8;
  static constexpr int kBlock = KIND == kWireNvfp4 ? 16 : KIND == kWireMxfp4 ? 32 : 0;
  static constexpr int kBytes = kBlock == 0 ? 0 : L < kBlock ? 1 : L / kBlock;
  uint32_t words[kWords];
  uint32_t bytes[kBytes == 0 ? 1 : kBytes];

  static __device__ __forceinline__ uint32_t* codes(const uint8_t* record) {
    return reinterpret_cast<uint32_t*>(const_cast<uint8_t*>(record) + kHeader) + threadIdx.x * kWords;
  }
  static __device__ __forceinline__ uint32_t payload(int chunk) { return chunk / L * kWords; }
  static __device__ __forceinline__ int64_t size(int chunk) {  // wire_record_bytes
    return kHeader + payload(chunk) * 4 + (kBlock == 0 ? 0 : chunk / (kBlock == 0 ? 1 : kBlock));
  }
  static __device__ __forceinline__ uint32_t block(int i) { return threadIdx.x * L / (kBlock ? kBlock : 1) + i; }
  static __device__ __forceinline__ uint8_t* scales(const uint8_t* record, int chunk) {
    return const_cast<uint8_t*>(record) + kHeader + payload(chunk) * 4;
  }
  // Whether the scale bytes are this thread's to write and to sum.
  static __device__ __forceinline__ bool owns() { return L >= kBlock || threadIdx.x % 2 == 0; }

  __device__ __forceinline__ uint32_t mixed(int chunk) const {
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) sum += mix(words[i], threadIdx.x * kWords + i);
#pragma unroll
    for (int i = 0; i < kBytes; ++i) sum += owns() ? mix(bytes[i], payload(chunk) + block(i)) : 0u;
    return sum;
  }

  __device__ __forceinline__ void read(const uint8_t* record, int chunk) {
    const uint32_t* from = codes(record);
    if (reinterpret_cast<uintptr_t>(record) % 16 == 0) {
      if constexpr (kWords == 2) {
        const uint2 v = __ldg(reinterpret_cast<const uint2*>(from));
        words[0] = v.x, words[1] = v.y;
      } else {
#pragma unroll
        for (int i = 0; i < kWords / 4; ++i) {
          const uint4 v = __ldg(reinterpret_cast<const uint4*>(from) + i);
          words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = from[i];
    }
#pragma unroll
    for (int i = 0; i < kBytes; ++i) bytes[i] = scales(record, chunk)[block(i)];
  }

  __device__ __forceinline__ void write(uint8_t* record, int chunk) const {
    uint32_t* to = codes(record);
    if (reinterpret_cast<uintptr_t>(record) % 16 == 0) {
      if constexpr (kWords == 2) {
        *reinterpret_cast<uint2*>(to) = {words[0], words[1]};
      } else {
#pragma unroll
        for (int i = 0; i < kWords / 4; ++i) {
          reinterpret_cast<uint4*>(to)[i] = {words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]};
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) to[i] = words[i];
    }
#pragma unroll
    for (int i = 0; i < kBytes; ++i) {
      if (owns()) scales(record, chunk)[block(i)] = static_cast<uint8_t>(bytes[i]);
    }
  }

  // Values in the basis that the record is in, under its scale g.
  __device__ __forceinline__ void values(float g, float (&y)[L]) const {
    if constexpr (KIND == kWireFp8 || KIND == kWireInt4) {
#pragma unroll
      for (int i = 0; i < L; ++i) {
        if constexpr (KIND == kWireFp8) {
          const uint32_t code = words[i / 4] << (24 - 8 * (i % 4));
          const float magnitude = floats((code >> 4) & 0x07f00000u) * 1.329227995784916e36f;
          y[i] = floats(bits(magnitude) | (code & kSign)) * g;
        } else {
          const uint32_t code = words[i / 8] << (28 - 4 * (i % 8));
          y[i] = floats(bits(float_of((code >> 28) & 7u)) | (code & kSign)) * g;
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < L / 8; ++i) {
        const uint32_t byte = bytes[L < kBlock ? 0 : i * 8 / kBlock];
        uint32_t pair[4];
        bf16x2_pairs(words[i], KIND == kWireNvfp4 ? e4m3_value(byte) : e8m0_value(byte), pair);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          y[8 * i + j] = floats(pair[j] << 16);
          y[8 * i + j + 4] = floats(pair[j] & 0xffff0000u);
        }
      }
#pragma unroll
      for (int i = 0; i < L; ++i) y[i] = y[i] * g;
    }
  }
};

__device__ __forceinline__ uint32_t count_word(int chunk, uint32_t count) {
  return count | static_cast<uint32_t>(31 - __clz(chunk)) << 24;
}

// ---- encoding -------------------------------------------------------------------------------------------------------

// |u| <= 448 -> E4M3, up if it is above the code below by more than `threshold` of a step.
__device__ __forceinline__ uint32_t e4m3_above(float u, float threshold) {
  const uint32_t b = bits(u);
  const float steps = (u > 0.015625f ? 0.015625f : u) * 512.0f;
  const uint32_t under = whole_part(steps);
  const bool normal = u >= 0.015625f;
  const uint32_t code = normal ? (b >> 20) - (120u << 3) : under;
  const float distance = normal ? float_of(b & 0xfffffu) * 9.5367431640625e-07f : steps - float_of(under);
  return code + (distance > threshold ? 1u : 0u);
}

// Rounds eight elements y times `multiplier` into words of a record from `to` on.
template <int KIND, int ROUND>
__device__ __forceinline__ void encode_eight(const float* y, float multiplier, float limit, const Words& noise,
                                             uint32_t* to) {
  float a[8], level[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) a[i] = at_most(fabsf(y[i] * multiplier), limit);
  if constexpr (KIND < kWireFp8 && ROUND == kWireStochastic) {
    to[0] = e2m1x8_stochastic(a, y, noise.w, level);
  } else if constexpr (KIND < kWireFp8) {
    float u[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) u[i] = floats(bits(a[i]) | (bits(y[i]) & kSign));
    to[0] = e2m1x8_nearest(u, level);
  } else {
    to[0] = 0;
    if (KIND == kWireFp8) to[1] = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t half = (noise.w[i / 2] >> (16 * (i % 2))) & 0xffffu;
      const float threshold = float_of(half << 6 | 32u) * 2.384185791015625e-07f;
      const uint32_t sign = bits(y[i]) >> 31;
      if constexpr (KIND == kWireFp8) {
        const uint32_t code = ROUND == kWireStochastic ? e4m3_above(a[i], threshold) : e4m3_nearest(a[i]);
        to[i / 4] |= (code | sign << 7) << (8 * (i % 4));
      } else {
        const uint32_t low = whole_part(a[i]), up = a[i] - float_of(low) > threshold ? 1u : 0u;
        const uint32_t code = ROUND == kWireStochastic ? low + up : bits(a[i] + 12582912.0f) & 0xfu;
        to[0] |= (code | sign << 3) << (4 * i);
      }
    }
  }
}

// Writes the record of y, 0 beyond `count`; number: the record's among those of its message.
template <int KIND, int ROUND, int L>
__device__ __forceinline__ void encode_record(const WireJob& job, float (&y)[L], uint32_t count, uint32_t number,
                                              uint32_t signs, Meeting& meeting, uint8_t* record) {
  constexpr int kBlock = Wire<KIND, L>::kBlock, kPart = kBlock == 0 || kBlock > L ? L : kBlock;
  Wire<KIND, L> wire;
  if (job.rotation > 1) flip(y, signs);
  wire_rotate(job.rotation, y);
  float found[L / kPart];
  float all = 0.0f;
#pragma unroll
  for (int b = 0; b < L / kPart; ++b) {
    found[b] = largest<kPart>(y + b * kPart);
    if (kBlock > L) found[b] = max_magnitude(found[b], __shfl_xor_sync(kWarp, found[b], 1));
    all = max_magnitude(all, found[b]);
  }
  const uint32_t top = max_of_block(bits(all) & 0x7fffffffu, meeting);
  const float amax = floats(top);
  float g = 1.0f;
  if constexpr (ROUND == kWireEden) {
    Job quantizer{};
    quantizer.v = job.v;
    float corrected[L / 16], largest_scale = 0.0f;
#pragma unroll
    for (int b = 0; b < L / 16; ++b) {
      corrected[b] = choose_eden<Side<16, 1, 1, kEden, false>>(quantizer, y + 16 * b, wire.words + 2 * b);
      largest_scale = max_magnitude(largest_scale, corrected[b]);
    }
    g = __fdiv_rn(floats(max_of_block(bits(largest_scale) & 0x7fffffffu, meeting)), 256.0f);
    g = g == 0.0f ? 1.0f : g;
    const uint32_t first = threadIdx.x * (L / 16);
    const Words noise = draw(job.noise, {job.noise.c1, job.noise.c2}, number * (job.chunk / 64) + first / 4);
#pragma unroll
    for (int b = 0; b < L / 16; ++b) {
      const uint32_t which = first % 4 + b;
      const uint32_t word = which == 0 ? noise.w[0] : which == 1 ? noise.w[1] : which == 2 ? noise.w[2] : noise.w[3];
      wire.bytes[b] = e4m3_stochastic(__fdiv_rn(corrected[b], g), word);
    }
  } else {
    float raw = 0.0f, multiplier = 0.0f;
    if constexpr (KIND == kWireNvfp4) {
      float s_enc = below(__fdiv_rn(job.numerator, amax), kMaxFloat);
      s_enc = amax == 0.0f || s_enc == 0.0f ? 1.0f : s_enc;
      g = __fdiv_rn(1.0f, s_enc);
      raw = s_enc * job.inverse_v;
    } else if constexpr (KIND != kWireMxfp4) {
      g = __fdiv_rn(amax, job.v);
      g = g == 0.0f ? 1.0f : g;
      multiplier = below(__fdiv_rn(1.0f, g), kMaxFloat);
    }
#pragma unroll
    for (int i = 0; i < L / 8; ++i) {
      const int b = i * 8 / kPart;
      if (i * 8 % kPart == 0 && kBlock != 0) {
        if constexpr (KIND == kWireNvfp4) {
          wire.bytes[b] = e4m3_nearest(found[b] * raw);
          multiplier = multiplier_of(e4m3_value(wire.bytes[b]), g);
        } else {
          Job quantizer{};
          quantizer.rule = kCeil;
          wire.bytes[b] = power_byte(found[b], quantizer);
          multiplier = below(e8m0_reciprocal(wire.bytes[b]), kMaxFloat);
        }
      }
      Words noise{};
      if constexpr (ROUND == kWireStochastic) {
        const uint32_t index = number * (job.chunk / 8) + threadIdx.x * (L / 8) + i;
        noise = draw(job.noise, {job.noise.c1, job.noise.c2}, index);
      }
      encode_eight<KIND, ROUND>(y + 8 * i, multiplier, KIND < kWireFp8 ? 6.0f : job.v, noise,
                                wire.words + i * (KIND == kWireFp8 ? 2 : 1));
    }
  }
  const bool bad = top >= kInfinity;
#pragma unroll
  for (int i = 0; i < wire.kWords; ++i) wire.words[i] = bad ? 0u : wire.words[i];
#pragma unroll
  for (int i = 0; i < wire.kBytes; ++i) wire.bytes[i] = bad ? 0u : wire.bytes[i];
  wire.write(record, job.chunk);
  const uint32_t w0 = job.word0 | (bad ? 1u : 0u), w1 = count_word(job.chunk, count);
  const uint32_t w2 = bad ? 0x7fc00000u : bits(g * job.shrink);
  uint32_t tag = 0;
  if (job.tagged) tag = sum_of_block(wire.mixed(job.chunk), meeting) + mixed_header(w0, w1, w2);
  if (threadIdx.x == 0) {
    auto* header = reinterpret_cast<uint32_t*>(record);
    header[0] = w0, header[1] = w1, header[2] = w2, header[3] = tag;
  }
}

// ---- launches -------------------------------------------------------------------------------------------------------

// resident: blocks of threads on a multiprocessor, of a kernel whose blocks fetch a record while they work on another;
// 0: a block for each record
template <class Kernel>
cudaError_t launch_wire(Kernel kernel, const WireJob& job, cudaStream_t stream, int resident = 0) {
  int64_t most = job.programs;
  if (resident > 0) {
    int device = 0, processors = 0;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) {
      return error;
    }
    if (const int64_t at_once = static_cast<int64_t>(processors) * resident; at_once < most) most = at_once;
  }
  const auto blocks = static_cast<unsigned>(job.number < most ? job.number : most);
  FP4DIST_LAUNCH(kernel, blocks, static_cast<unsigned>(job.chunk / wire_run(job.chunk)), 0, stream, job);
  return cudaGetLastError();
}

}  // namespace fp4dist
