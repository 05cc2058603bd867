// Philox-4x32-10 by the place of an element in the whole operand: fp4dist/numerics/rng.py on the device.
#pragma once

#include "portable.cuh"
#include "quantize.h"

namespace fp4dist {

struct Words {
  uint32_t w[4];
};

// keys: see Place.
__device__ __forceinline__ Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, const uint32_t* keys) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xd2511f53u;
    const uint64_t p1 = static_cast<uint64_t>(c2) * 0xcd9e8d57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ keys[2 * round];
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ keys[2 * round + 1];
    c3 = static_cast<uint32_t>(p0);
  }
  return {{c0, c1, c2, c3}};
}

// The time words of a counter: read once by each thread.
struct Moment {
  uint32_t micro_batch, step;
};

__device__ __forceinline__ Moment moment(const Place& place) {
  return place.when ? Moment{place.when[0], place.when[1]} : Moment{place.c1, place.c2};
}

__device__ __forceinline__ Words draw(const Place& place, const Moment& now, uint32_t index) {
  return philox(index, now.micro_batch, now.step, place.c3, place.keys);
}

__device__ __forceinline__ uint32_t global_row(const Place& place, uint32_t row) {
  return row < place.row_run ? place.r0 + row : place.r1 + row - place.row_run;
}

__device__ __forceinline__ uint32_t global_group(const Place& place, uint32_t group) {
  return group < place.column_run ? place.q0 + group : place.q1 + group - place.column_run;
}

}  // namespace fp4dist
