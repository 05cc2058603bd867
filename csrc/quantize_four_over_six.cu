// NVFP4 with four-over-six.
#include "quantize.cuh"
#include "quantize_families.h"

namespace fp4dist {

Launch find_four_over_six(const Job& job) {
  return first_of<Side<16, 1, 1, kFourOverSix, false>, Side<16, 16, 1, kFourOverSix, false>>(job);
}

}  // namespace fp4dist
