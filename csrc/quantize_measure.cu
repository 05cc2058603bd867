// The amax of a rotated matrix, or of one that is not dense.
#include "quantize.cuh"
#include "quantize_families.h"

namespace fp4dist {

Launch find_measure(const Job& job) {
  return first_of<Side<16, 1, 1, kMeasure, false>, Side<16, 1, 16, kMeasure, false>, Side<16, 1, 32, kMeasure, false>>(
      job);
}

}  // namespace fp4dist
