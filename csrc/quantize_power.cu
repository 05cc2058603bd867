// MXFP4 by powers of two of the amax.
#include "quantize.cuh"
#include "quantize_families.h"

namespace fp4dist {

Launch find_power(const Job& job) {
  return first_of<Side<32, 1, 1, kFloor, false>, Side<32, 1, 1, kFloor, true>, Side<32, 1, 32, kFloor, false>,
                  Side<32, 32, 1, kFloor, false>>(job);
}

}  // namespace fp4dist
