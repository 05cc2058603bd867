// NVFP4 by the amax of a block, stochastically.
#include "quantize.cuh"
#include "quantize_families.h"

namespace fp4dist {

Launch find_amax_noisy(const Job& job) {
  return first_of<Side<16, 1, 1, kAmax, true>, Side<16, 1, 16, kAmax, true>, Side<16, 1, 32, kAmax, true>>(job);
}

}  // namespace fp4dist
