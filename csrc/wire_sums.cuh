// Sums of several senders' records, for wire_sum.cu and wire_recode.cu.
#pragma once

#include "wire.cuh"

namespace fp4dist {

// One sender's record in a thread's registers.
template <int KIND, int L>
struct Incoming {
  Wire<KIND, L> wire;
  uint32_t header[4];

  __device__ __forceinline__ void read(const uint8_t* record, int chunk) {
    if (reinterpret_cast<uintptr_t>(record) % 16 == 0) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(record));
      header[0] = v.x, header[1] = v.y, header[2] = v.z, header[3] = v.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) header[i] = reinterpret_cast<const uint32_t*>(record)[i];
    }
    wire.read(record, chunk);
  }
};

// The records that a block sums, sender by sender and sum by sum: while one is worked on the next is on its way, and
// those of the sum after the next on theirs to a cache. A thread's part of a record is too little to be waited for.
template <int KIND, int L>
struct Arrivals {
  static constexpr bool kAhead = L == 16;  // long runs leave no registers for another record
  const WireJob& job;
  int32_t number, place, following, later;  // of this sum; where in a message its records are, and of the next two
  int32_t sender;
  uint32_t signs;  // of senders that share them
  Incoming<KIND, L> next;

  __device__ __forceinline__ explicit Arrivals(const WireJob& of)
      : job(of), number(static_cast<int32_t>(blockIdx.x)), sender(0), signs(0) {
    place = place_of(number);
    following = place_of(number + stride());
    later = place_of(number + 2 * stride());
    if (kAhead && place >= 0) read();
    fetch(following);
    if (job.rotation > 1 && !job.per_rank) {
      signs = wire_signs<L>(job.source_signs, static_cast<uint32_t>(job.ranks[0]), job.rotation);
    }
  }

  __device__ __forceinline__ int32_t stride() const { return static_cast<int32_t>(gridDim.x); }
  __device__ __forceinline__ int32_t place_of(int32_t i) const {
    return i < job.number ? static_cast<int32_t>(job.table[4 * static_cast<int64_t>(i) + 3]) : -1;
  }

  // The records at this place, 32 bytes a thread.
  __device__ __forceinline__ void fetch(int32_t at) const {
    const int64_t size = Wire<KIND, L>::size(job.chunk);
    if (at < 0 || threadIdx.x * 32 >= size) return;
    const uint8_t* from = job.sources + at * size + threadIdx.x * 32;
    for (int s = 0; s < job.senders; ++s) fetch_ahead(from + s * job.source_bytes);
  }

  __device__ __forceinline__ void read() {
    next.read(job.sources + sender * job.source_bytes + place * Wire<KIND, L>::size(job.chunk), job.chunk);
  }

  __device__ __forceinline__ Incoming<KIND, L> take() {
    if (!kAhead) read();
    const Incoming<KIND, L> found = next;
    if (++sender == job.senders) {
      sender = 0;
      number += stride();
      place = following;
      following = later;
      fetch(following);
      later = place_of(number + 2 * stride());
    }
    if (kAhead && place >= 0) read();
    return found;
  }
};

// Notes the `position` of a record that is wrong in job.bad.
template <int KIND, int L>
__device__ __forceinline__ void check(const WireJob& job, const Incoming<KIND, L>& record, uint32_t position,
                                      uint32_t count, Meeting& meeting) {
  if (!job.bad) return;
  const uint32_t w0 = record.header[0], w1 = record.header[1];
  uint32_t tag = record.header[3];
  if (job.tagged) tag -= sum_of_block(record.wire.mixed(job.chunk), meeting) + mixed_header(w0, w1, record.header[2]);
  const bool wrong = (w0 & ~1u) != job.word0 || w1 != count_word(job.chunk, count) || (job.tagged && tag != 0);
  if (wrong && threadIdx.x == 0) atomicMin(job.bad, position);
}

// The senders' records at `position` of each, summed in their order, turned back: once, or each under its own signs.
template <int KIND, int L>
__device__ __forceinline__ void sum_records(const WireJob& job, Arrivals<KIND, L>& arrivals, int64_t position,
                                            uint32_t count, Meeting& meeting, float (&y)[L]) {
#pragma unroll
  for (int i = 0; i < L; ++i) y[i] = -0.0f;  // to which x is added without a change
#pragma unroll 1
  for (int s = 0; s < job.senders; ++s) {
    const Incoming<KIND, L> record = arrivals.take();
    check(job, record, static_cast<uint32_t>(s * job.all_records + position), count, meeting);
    float z[L];
    record.wire.values(floats(record.header[2]), z);
    if (!job.per_rank) {
#pragma unroll
      for (int i = 0; i < L; ++i) z[i] = y[i] + z[i];
    }
    if (job.rotation > 1 && (job.per_rank || s == job.senders - 1)) {
      wire_rotate(job.rotation, z);
      const uint32_t signs =
          job.per_rank ? wire_signs<L>(job.source_signs, static_cast<uint32_t>(job.ranks[s]), job.rotation)
                       : arrivals.signs;
      flip(z, signs);
    }
#pragma unroll
    for (int i = 0; i < L; ++i) y[i] = job.per_rank ? y[i] + z[i] : z[i];
  }
}

// The same of records that are not rotated, without looking beyond this sum.
template <int KIND, int L>
__device__ __forceinline__ void add_records(const WireJob& job, int64_t position, uint32_t count, Meeting& meeting,
                                            float (&y)[L]) {
  constexpr bool kAhead = L == 16;  // long runs leave no registers for another record
  const uint8_t* from = job.sources + position * Wire<KIND, L>::size(job.chunk);
  Incoming<KIND, L> next;
  if (kAhead) next.read(from, job.chunk);
#pragma unroll
  for (int i = 0; i < L; ++i) y[i] = -0.0f;  // to which x is added without a change
#pragma unroll 1
  for (int s = 0; s < job.senders; ++s, from += job.source_bytes) {
    if (!kAhead) next.read(from, job.chunk);
    const Incoming<KIND, L> record = next;
    if (kAhead && s + 1 < job.senders) next.read(from + job.source_bytes, job.chunk);
    check(job, record, static_cast<uint32_t>(s * job.all_records + position), count, meeting);
    float z[L];
    record.wire.values(floats(record.header[2]), z);
#pragma unroll
    for (int i = 0; i < L; ++i) y[i] = y[i] + z[i];
  }
}

}  // namespace fp4dist
