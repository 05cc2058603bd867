// Records of several senders -> records of their sum, without the sum in memory.
#include "wire_sums.cuh"

namespace fp4dist {
namespace {

// table: the number of each record, its elements, where they are in x, its place in `records` and `sources`.
template <int KIND, int ROUND, int L>
__global__ void __launch_bounds__(L == 16 ? 256 : kWireThreads, L == 16 ? 3 : 1)
    recode_kernel(const __grid_constant__ WireJob job) {
  __shared__ uint32_t parts[2 * kWireWarps];
  Meeting meeting{parts, 0};
  Arrivals<KIND, L> arrivals(job);
  const uint32_t signs = wire_signs<L>(job.signs, job.signs.c1, job.rotation);
  for (int64_t i = blockIdx.x; i < job.number; i += gridDim.x) {
    const int64_t* row = job.table + 4 * i;
    const int count = static_cast<int>(row[1] * job.unit), at = static_cast<int>(threadIdx.x) * L;
    int64_t next_at = 0;  // of what the next sum adds: on its way to a cache from here on
    int next_count = 0;
    if (job.x.data && i + gridDim.x < job.number) {
      const int64_t* next = row + 4 * static_cast<int64_t>(gridDim.x);
      next_at = next[2] * job.unit;
      next_count = static_cast<int>(next[1] * job.unit);
    }
    float y[L];
    sum_records<KIND, L>(job, arrivals, row[3], static_cast<uint32_t>(count), meeting, y);
    if (job.x.data) {
      add_run(job.x, row[2] * job.unit + at, count - at, y);
      fetch_run_ahead<L>(job.x, next_at + at, next_count - at);
    }
#pragma unroll
    for (int j = 0; j < L; ++j) y[j] = at + j < count ? y[j] * job.factor : 0.0f;
    encode_record<KIND, ROUND, L>(job, y, static_cast<uint32_t>(count), static_cast<uint32_t>(row[0]), signs, meeting,
                                  job.records + row[3] * Wire<KIND, L>::size(job.chunk));
  }
}

template <int KIND, int ROUND>
cudaError_t launch(const WireJob& job, cudaStream_t stream) {
  const int resident = 768 / (job.chunk / wire_run(job.chunk));  // what the registers leave room for
  if (wire_run(job.chunk) == 16) return launch_wire(&recode_kernel<KIND, ROUND, 16>, job, stream, resident);
  return launch_wire(&recode_kernel<KIND, ROUND, 32>, job, stream, resident);
}

}  // namespace

cudaError_t launch_wire_recode(const WireJob& job, cudaStream_t stream) {
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
