// Vectors -> records.
#include "wire.cuh"

namespace fp4dist {
namespace {

// table: where the elements of each record begin in x, how many they are, the record's number, its place.
template <int KIND, int ROUND, int L>
__global__ void __launch_bounds__(L == 16 ? 256 : kWireThreads) encode_kernel(const __grid_constant__ WireJob job) {
  __shared__ uint32_t parts[2 * kWireWarps];
  Meeting meeting{parts, 0};
  const uint32_t signs = wire_signs<L>(job.signs, job.signs.c1, job.rotation);
  for (int64_t i = blockIdx.x; i < job.number; i += gridDim.x) {
    const int64_t* row = job.table + 4 * i;
    const int count = static_cast<int>(row[1] * job.unit), at = static_cast<int>(threadIdx.x) * L;
    float y[L];
    read_run(job.x, row[0] * job.unit + at, count - at, y);
    encode_record<KIND, ROUND, L>(job, y, static_cast<uint32_t>(count), static_cast<uint32_t>(row[2]), signs, meeting,
                                  job.records + row[3] * Wire<KIND, L>::size(job.chunk));
  }
}

template <int KIND, int ROUND>
cudaError_t launch(const WireJob& job, cudaStream_t stream) {
  if (wire_run(job.chunk) == 16) return launch_wire(&encode_kernel<KIND, ROUND, 16>, job, stream);
  return launch_wire(&encode_kernel<KIND, ROUND, 32>, job, stream);
}

}  // namespace

cudaError_t launch_wire_encode(const WireJob& job, cudaStream_t stream) {
  switch (job.kind * 3 + job.rounding) {
    case kWireNvfp4 * 3 + kWireNearest:
      return launch<kWireNvfp4, kWireNearest>(job, stream);
    case kWireNvfp4 * 3 + kWireStochastic:
      return launch<kWireNvfp4, kWireStochastic>(job, stream);
    case kWireNvfp4 * 3 + kWireEden:
      return launch<kWireNvfp4, kWireEden>(job, stream);
    case kWireMxfp4 * 3 + kWireNearest:
      return launch<kWireMxfp4, kWireNearest>(job, stream);
    case kWireMxfp4 * 3 + kWireStochastic:
      return launch<kWireMxfp4, kWireStochastic>(job, stream);
    case kWireFp8 * 3 + kWireNearest:
      return launch<kWireFp8, kWireNearest>(job, stream);
    case kWireFp8 * 3 + kWireStochastic:
      return launch<kWireFp8, kWireStochastic>(job, stream);
    case kWireInt4 * 3 + kWireNearest:
      return launch<kWireInt4, kWireNearest>(job, stream);
    case kWireInt4 * 3 + kWireStochastic:
      return launch<kWireInt4, kWireStochastic>(job, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace fp4dist
