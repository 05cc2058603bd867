// Runs of a vector in memory, bf16 or fp32, at any place: a thread's L elements of it.
#pragma once

#include "tile.cuh"
#include "wire.h"

namespace fp4dist {

// L elements of a vector from `start` on, of which `left` are inside; 0 beyond.
template <int L>
__device__ __forceinline__ void read_run(const Vector& x, int64_t start, int left, float (&y)[L]) {
  if (left >= L) {
    if (x.wide) {
      Row<L, true> row;
      row.read(x.data, start);
      row.get(y);
    } else {
      Row<L, false> row;
      row.read(x.data, start);
      row.get(y);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < L; ++i) {
    y[i] = 0.0f;
    if (i < left) y[i] = x.wide ? element<true>(x.data, start + i) : element<false>(x.data, start + i);
  }
}

// What read_run would read, into a cache.
template <int L>
__device__ __forceinline__ void fetch_run_ahead(const Vector& x, int64_t start, int left) {
  if (left < L) return;
  const int size = x.wide ? 4 : 2;
  const auto* place = static_cast<const unsigned char*>(x.data) + start * size;
  for (int i = 0; i < L * size; i += 32) fetch_ahead(place + i);
}

// y += what read_run would read; sixteen at a time, which needs fewer registers.
template <int L>
__device__ __forceinline__ void add_run(const Vector& x, int64_t start, int left, float (&y)[L]) {
  float part[16];
#pragma unroll
  for (int h = 0; h < L; h += 16) {
    read_run(x, start + h, left - h, part);
#pragma unroll
    for (int i = 0; i < 16; ++i) y[h + i] += part[i];
  }
}

constexpr int kExchanged = 4;                // vectors of a lane at a time
constexpr int kWarpRoom = 32 * kExchanged;  // shared vectors that a warp needs for them

// Stores the N vectors of each lane, which follow each other from `to` on, the first lane's place. A lane's own stores
// would each take a memory line for 16 of its bytes; those of a warp that has exchanged them write lines whole.
template <int N>
__device__ __forceinline__ void store_lines(uint4* to, const uint4 (&v)[N], uint4* room) {
  constexpr uint32_t P = N < kExchanged ? N : kExchanged, kRotate = 8 / P;  // eight lanes meet all banks
  const uint32_t lane = threadIdx.x % 32;
  const auto place = [](uint32_t of, uint32_t i) { return of * P + (i ^ (of / kRotate % P)); };
#pragma unroll
  for (uint32_t first = 0; first < N; first += P) {
    __syncwarp();  // what stood here has been read
#pragma unroll
    for (uint32_t i = 0; i < P; ++i) room[place(lane, i)] = v[first + i];
    __syncwarp();
#pragma unroll
    for (uint32_t i = 0; i < P; ++i) {
      const uint32_t of = (32 * i + lane) / P, which = lane % P;
      to[of * N + first + which] = room[place(of, which)];
    }
  }
}

// y from `start` on, `left` of them; all lanes of a warp take part, whose runs follow each other. room: the warp's,
// [kWarpRoom] in shared memory.
template <int L>
__device__ __forceinline__ void write_run(const Vector& out, int64_t start, int left, const float (&y)[L],
                                          uint4* room) {
  auto* place = static_cast<unsigned char*>(out.data) + start * (out.wide ? 4 : 2);
  const bool whole = left >= L && reinterpret_cast<uintptr_t>(place) % 16 == 0;
  if (__all_sync(kWarp, whole)) {
    auto* first = static_cast<unsigned char*>(out.data) + (start - threadIdx.x % 32 * L) * (out.wide ? 4 : 2);
    if (out.wide) {
      uint4 v[L / 4];
#pragma unroll
      for (int i = 0; i < L / 4; ++i) {
        v[i] = {bits(y[4 * i]), bits(y[4 * i + 1]), bits(y[4 * i + 2]), bits(y[4 * i + 3])};
      }
      store_lines(reinterpret_cast<uint4*>(first), v, room);
    } else {
      uint4 v[L / 8];
#pragma unroll
      for (int i = 0; i < L / 8; ++i) {
        const float* z = y + 8 * i;
        v[i] = {bf16x2_nearest(z[0], z[1]), bf16x2_nearest(z[2], z[3]), bf16x2_nearest(z[4], z[5]),
                bf16x2_nearest(z[6], z[7])};
      }
      store_lines(reinterpret_cast<uint4*>(first), v, room);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < L; ++i) {
    if (i >= left) continue;
    if (out.wide) {
      reinterpret_cast<float*>(place)[i] = y[i];
    } else {
      reinterpret_cast<uint16_t*>(place)[i] = static_cast<uint16_t>(bf16x2_nearest(y[i], 0.0f));
    }
  }
}

}  // namespace fp4dist
