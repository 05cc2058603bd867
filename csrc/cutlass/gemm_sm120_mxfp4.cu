// MXFP4 on sm_120a.
#include "gemm.cuh"

namespace fp4dist {

using Here = Instances<Sm120, true>;
extern const Multiplier kSm120Mxfp4{&Here::scratch, &Here::run};

}  // namespace fp4dist
