// NVFP4 by the amax of a block, to nearest.
#include "quantize.cuh"
#include "quantize_families.h"

namespace fp4dist {

Launch find_amax(const Job& job) {
  return first_of<Side<16, 1, 1, kAmax, false>, Side<16, 1, 16, kAmax, false>, Side<16, 16, 1, kAmax, false>>(job);
}

}  // namespace fp4dist
