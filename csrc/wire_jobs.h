// A call of the wire codec as numbers in a fixed order: that of fp4dist/kernels/cuda/wire.py.
#pragma once

#include "jobs.h"
#include "wire.h"

namespace fp4dist {

constexpr int64_t kWireIntegers = 24, kWireFloats = 4;

inline WireJob wire_job_of(const int64_t* n, const double* f) {
  WireJob job{};
  int32_t* const fields[] = {&job.kind, &job.rounding, &job.rotation, &job.chunk, &job.tagged, &job.per_rank};
  for (int i = 0; i < 6; ++i) *fields[i] = static_cast<int32_t>(n[i]);
  job.word0 = static_cast<uint32_t>(n[6]);
  job.unit = static_cast<int32_t>(n[7]);
  job.programs = static_cast<int32_t>(n[8]);
  job.noise = place_of(n + 9, nullptr, nullptr);
  job.signs = place_of(n + 14, nullptr, nullptr);
  job.source_signs = place_of(n + 19, nullptr, nullptr);
  job.numerator = static_cast<float>(f[0]);
  job.inverse_v = static_cast<float>(f[1]);
  job.v = static_cast<float>(f[2]);
  job.factor = static_cast<float>(f[3]);
  job.shrink = 1.0f / static_cast<float>(job.rotation);  // a power of two
  return job;
}

}  // namespace fp4dist
