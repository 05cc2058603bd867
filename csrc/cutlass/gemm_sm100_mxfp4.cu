// MXFP4 on sm_100a.
#include "gemm.cuh"

namespace fp4dist {

using Here = Instances<Sm100, true>;
extern const Multiplier kSm100Mxfp4{&Here::scratch, &Here::run};

}  // namespace fp4dist
