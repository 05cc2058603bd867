// The wire codec's entry points as C functions: see glue.cpp.
#include "wire_jobs.h"

using fp4dist::PlainJob;
using fp4dist::Vector;
using fp4dist::WireJob;

// A call's tensors: fp4dist/kernels/cuda's, by address. wide: whether x and out are fp32.
struct WirePointers {
  void* x;
  void* out;
  void* records;
  const void* sources;
  const void* table;
  const void* ranks;
  void* bad;
  int64_t x_wide, out_wide, number, senders, all_records, source_bytes;
};

extern "C" {

// what: 0 encode, 1 sum, 2 recode.
int emulated_wire(int what, const WirePointers* p, const int64_t* how, const double* factors) {
  WireJob job = fp4dist::wire_job_of(how, factors);
  job.x = {p->x, static_cast<int32_t>(p->x_wide)};
  job.out = {p->out, static_cast<int32_t>(p->out_wide)};
  job.records = static_cast<uint8_t*>(p->records);
  job.sources = static_cast<const uint8_t*>(p->sources);
  job.table = static_cast<const int64_t*>(p->table);
  job.ranks = static_cast<const int32_t*>(p->ranks);
  job.bad = static_cast<uint32_t*>(p->bad);
  job.number = p->number;
  job.senders = static_cast<int32_t>(p->senders);
  job.all_records = p->all_records;
  job.source_bytes = p->source_bytes;
  if (what == 0) return fp4dist::launch_wire_encode(job, nullptr);
  return what == 1 ? fp4dist::launch_wire_sum(job, nullptr) : fp4dist::launch_wire_recode(job, nullptr);
}

int emulated_wire_plain(void* out, int out_wide, void* own, int own_wide, void* messages, int wide, const int64_t* table,
                        int64_t number, int64_t source_elements, int unit, int senders, int own_at, double factor) {
  const PlainJob job{{out, out_wide},
                     {own, own_wide},
                     {messages, wide},
                     table,
                     number,
                     source_elements,
                     unit,
                     senders,
                     own_at,
                     static_cast<float>(factor)};
  return fp4dist::launch_wire_plain(job, nullptr);
}

}  // extern "C"
