// MXFP4 by powers of two of the moments.
#include "quantize.cuh"
#include "quantize_families.h"

namespace fp4dist {

Launch find_quest(const Job& job) {
  return first_of<Side<32, 1, 32, kQuestFloor, false>, Side<32, 1, 128, kQuestFloor, false>>(job);
}

}  // namespace fp4dist
