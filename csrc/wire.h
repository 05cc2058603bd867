// Host entry points of the wire codec: vectors to records of 4- or 8-bit codes, sums of several senders' records.
// fp4dist/comm/{codec,records}.py say what every bit is. As quantize.h: no torch header is included here.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "quantize.h"

namespace fp4dist {

// The numbers are those of a record's header word 0.
enum WireKind : int32_t { kWireNvfp4 = 0, kWireMxfp4 = 1, kWireFp8 = 2, kWireInt4 = 3 };
enum WireRounding : int32_t { kWireNearest = 0, kWireStochastic = 1, kWireEden = 2 };

constexpr int kHeader = 16;                           // bytes of a record before its codes
constexpr int kShortest = 512, kLongest = 16384;      // elements of a record, a power of two
constexpr int kPlainRun = 4096;                       // elements of a plain message that one block sums

// A vector in memory, bf16 or (wide) fp32; places count elements from `data`.
struct Vector {
  void* data;
  int32_t wide;
};

// What all records of a call share, and where they are.
struct WireJob {
  int32_t kind, rounding, rotation, chunk;  // rotation: 1 for none
  int32_t tagged, per_rank;
  uint32_t word0;                    // of a record whose elements are all finite
  float numerator, inverse_v, v;     // of the scale rule
  float shrink, factor;              // 1 / rotation; what multiplies a sum
  Place noise, signs;                // of what is encoded: c1 is the sender, or what its signs are keyed by
  Place source_signs;                // of what is summed; c1 comes from `ranks`
  const int64_t* table;              // [number, 4], see the kernels; its places count `unit` elements
  int64_t number;
  int32_t unit, programs;            // programs: blocks of threads at most
  uint8_t* records;                  // written by encode and recode
  const uint8_t* sources;            // read by sum and recode: the first sender's records
  int64_t all_records, source_bytes; // of a sender; between two senders
  int32_t senders;
  const int32_t* ranks;              // that the senders' signs are keyed by: [senders], or [1] for all
  Vector x, out;                     // x: what is encoded, or added to a sum (data null: nothing); out: of a sum
  uint32_t* bad;                     // the least sender * all_records + record that is wrong; null: not checked
};

// Bytes of a record.
constexpr int64_t wire_record_bytes(int kind, int chunk) {
  return kHeader + (kind == kWireFp8 ? chunk : chunk / 2) +
         (kind == kWireNvfp4 ? chunk / 16 : kind == kWireMxfp4 ? chunk / 32 : 0);
}

cudaError_t launch_wire_encode(const WireJob& job, cudaStream_t stream);
cudaError_t launch_wire_sum(const WireJob& job, cudaStream_t stream);
cudaError_t launch_wire_recode(const WireJob& job, cudaStream_t stream);

// Plain messages: out = (the senders' elements in order, own as number own_at among them) * factor, in fp32.
struct PlainJob {
  Vector out, own, messages;  // own.data null: none
  const int64_t* table;       // [number, 4]: places count `unit` elements
  int64_t number, source_elements;
  int32_t unit, senders, own_at;
  float factor;
};
cudaError_t launch_wire_plain(const PlainJob& job, cudaStream_t stream);

}  // namespace fp4dist
