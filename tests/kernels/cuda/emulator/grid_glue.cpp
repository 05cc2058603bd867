// The entry points of grid.h and filter.h as C functions, for ctypes; see glue.cpp.
#include "filter.h"
#include "grid.h"

extern "C" {

int emulated_grid_quantize(const fp4dist::GridPointers* pointers, int64_t code_stride, const int64_t* how,
                           const double* factors) {
  auto job = fp4dist::grid_job_of(*pointers, how, factors);
  job.code_stride = code_stride;
  return fp4dist::launch_grid(job, nullptr);
}

int emulated_grid_largest(const fp4dist::GridPointers* pointers, const int64_t* how, const double* factors, int by_row,
                          uint32_t* top) {
  return fp4dist::launch_grid_largest(fp4dist::grid_job_of(*pointers, how, factors), by_row != 0, top, nullptr);
}

int emulated_grid_decode(const void* codes, const void* scales, const void* factors, const int64_t* how,
                         const double* levels, void* values) {
  return fp4dist::launch_grid_decode(fp4dist::grid_decode_of(codes, scales, factors, how, levels, values), nullptr);
}

// which: 0 the mask, 1 the filter, 2 codes turned back
int emulated_filter(int which, const fp4dist::FilterPointers* pointers, const int64_t* how, const double* factors) {
  const auto job = fp4dist::filter_of(*pointers, how, factors);
  if (which == 0) return fp4dist::launch_mask(job, nullptr);
  return which == 1 ? fp4dist::launch_filter(job, nullptr) : fp4dist::launch_turn_back(job, nullptr);
}

}  // extern "C"
