// NVFP4 on sm_120a.
#include "gemm.cuh"

namespace fp4dist {

using Here = Instances<Sm120, false>;
extern const Multiplier kSm120Nvfp4{&Here::scratch, &Here::run};

}  // namespace fp4dist
