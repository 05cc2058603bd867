// A job as numbers in a fixed order, which is how it passes a door that knows tensors and lists alone. The order is
// that of fp4dist/kernels/cuda/jobs.py.
#pragma once

#include <cstdint>

#include "decode.h"
#include "quantize.h"

namespace fp4dist {

constexpr int64_t kJobIntegers = 41, kJobFloats = 7, kPlaceIntegers = 12;

struct JobPointers {
  const void* data;
  const void* q_scales;
  const void* q_global;
  const void* outer;
  const void* when;
  void* codes;
  void* scales;
  void* values;
  void* top;
  void* global_scale;
  void* kept;
};

// Where noise comes from, of key, counter words and positions: n[0..5) and, unless null, at[0..7).
inline Place place_of(const int64_t* n, const int64_t* at, const void* when) {
  Place place{};
  auto k0 = static_cast<uint32_t>(n[0]), k1 = static_cast<uint32_t>(n[1]);
  for (int round = 0; round < 10; ++round, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {  // of Philox-4x32-10
    place.keys[2 * round] = k0;
    place.keys[2 * round + 1] = k1;
  }
  place.c1 = static_cast<uint32_t>(n[2]);
  place.c2 = static_cast<uint32_t>(n[3]);
  place.c3 = static_cast<uint32_t>(n[4]);
  place.when = static_cast<const uint32_t*>(when);
  uint32_t* const positions[] = {&place.width,      &place.row_run, &place.r0, &place.r1,
                                 &place.column_run, &place.q0,      &place.q1};
  for (int i = 0; at != nullptr && i < 7; ++i) *positions[i] = static_cast<uint32_t>(at[i]);
  return place;
}

inline Job job_of(const JobPointers& p, const int64_t* n, const double* f) {
  const auto number = [n](int i) { return static_cast<int32_t>(n[i]); };
  const auto word = [n](int i) { return static_cast<uint32_t>(n[i]); };
  const auto real = [f](int i) { return static_cast<float>(f[i]); };
  Job job{};
  job.data = p.data;
  job.stride = n[0];
  job.source = number(1);
  job.turned = number(2);
  job.rows = number(3);
  job.cols = number(4);
  job.q_scales = static_cast<const uint8_t*>(p.q_scales);
  job.q_global = static_cast<const float*>(p.q_global);
  job.q_rows = number(5);
  job.q_cols = number(6);
  job.back = number(7);
  job.back_signs = word(8);
  job.back_nth = real(0);
  job.rule = number(9);
  job.noisy = number(10);
  job.rotation = number(11);
  job.block_rows = number(12);
  job.block_cols = number(13);
  job.metric = number(14);
  job.about_mean = number(15);
  job.nonzero = number(16);
  job.swizzled = number(17);
  job.numerator = real(1);
  job.inverse_v = real(2);
  job.v = real(3);
  job.before = real(4);
  job.finer = real(5);
  job.factor = real(6);
  job.signs.mode = number(18);
  for (int i = 0; i < 4; ++i) job.signs.words[i] = word(19 + i);
  job.signs.place = place_of(n + 23, nullptr, p.when);
  job.noise = place_of(n + 28, n + 33, p.when);
  job.outer = static_cast<const uint32_t*>(p.outer);
  job.codes = static_cast<uint32_t*>(p.codes);
  job.scales = p.scales;
  job.narrow = number(40);
  job.values = static_cast<uint32_t*>(p.values);
  job.memory = job.narrow ? static_cast<uint32_t*>(p.top) : nullptr;
  job.top = job.narrow ? job.memory + kLargest : static_cast<uint32_t*>(p.top);
  job.kept = static_cast<uint32_t*>(p.kept);
  job.global_scale = static_cast<float*>(p.global_scale);
  return job;
}

}  // namespace fp4dist
