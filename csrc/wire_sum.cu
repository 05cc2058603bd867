// Records, or plain elements, of several senders -> the vector of their sums.
#include "wire_sums.cuh"

namespace fp4dist {
namespace {

// table: where the elements of each record go in out, how many they are, where they are in x, the record's place.
template <int KIND, int L, bool TURNED>
__global__ void __launch_bounds__(L == 16 ? 256 : kWireThreads, L == 32 ? 1 : KIND == kWireFp8 && TURNED ? 3 : 4)
    sum_kernel(const __grid_constant__ WireJob job) {
  __shared__ uint32_t parts[2 * kWireWarps];
  __shared__ uint4 rooms[(L == 16 ? 8 : kWireWarps) * kWarpRoom];
  Meeting meeting{parts, 0};
  const auto each = [&](const auto& sum) {
    for (int64_t i = blockIdx.x; i < job.number; i += gridDim.x) {
      const int64_t* row = job.table + 4 * i;
      const int count = static_cast<int>(row[1] * job.unit), at = static_cast<int>(threadIdx.x) * L;
      float y[L];
      sum(row[3], static_cast<uint32_t>(count), y);
      if (job.x.data) add_run(job.x, row[2] * job.unit + at, count - at, y);
#pragma unroll
      for (int j = 0; j < L; ++j) y[j] = y[j] * job.factor;
      write_run(job.out, row[0] * job.unit + at, count - at, y, rooms + threadIdx.x / 32 * kWarpRoom);
    }
  };
  if constexpr (TURNED) {
    Arrivals<KIND, L> arrivals(job);
    each([&](int64_t position, uint32_t count, float(&y)[L]) {
      sum_records<KIND, L>(job, arrivals, position, count, meeting, y);
    });
  } else {
    each([&](int64_t position, uint32_t count, float(&y)[L]) {
      add_records<KIND, L>(job, position, count, meeting, y);
    });
  }
}

// table: where elements go in out, how many they are, where they are in own, where in a sender's message.
__global__ void __launch_bounds__(256) plain_kernel(const __grid_constant__ PlainJob job) {
  constexpr int L = kPlainRun / 256;
  __shared__ uint4 rooms[8 * kWarpRoom];
  const int64_t* row = job.table + 4 * static_cast<int64_t>(blockIdx.x);
  const int at = static_cast<int>(threadIdx.x) * L, left = static_cast<int>(row[1] * job.unit) - at;
  float y[L], z[L];
  int added = 0;
  const auto add = [&](const Vector& x, int64_t start) {
    read_run(x, start, left, z);
#pragma unroll
    for (int j = 0; j < L; ++j) y[j] = added == 0 ? z[j] : y[j] + z[j];
    ++added;
  };
  for (int s = 0; s < job.senders; ++s) {
    if (job.own.data && s == job.own_at) add(job.own, row[2] * job.unit + at);
    add(job.messages, s * job.source_elements + row[3] * job.unit + at);
  }
  if (job.own.data && job.own_at >= job.senders) add(job.own, row[2] * job.unit + at);
#pragma unroll
  for (int j = 0; j < L; ++j) y[j] = y[j] * job.factor;
  write_run(job.out, row[0] * job.unit + at, left, y, rooms + threadIdx.x / 32 * kWarpRoom);
}

template <int KIND>
cudaError_t launch(const WireJob& job, cudaStream_t stream) {
  const bool turned = job.rotation > 1;
  if (wire_run(job.chunk) == 16) {
    return launch_wire(turned ? &sum_kernel<KIND, 16, true> : &sum_kernel<KIND, 16, false>, job, stream);
  }
  return launch_wire(turned ? &sum_kernel<KIND, 32, true> : &sum_kernel<KIND, 32, false>, job, stream);
}

}  // namespace

cudaError_t launch_wire_sum(const WireJob& job, cudaStream_t stream) {
  switch (job.kind) {
    case kWireNvfp4:
      return launch<kWireNvfp4>(job, stream);
    case kWireMxfp4:
      return launch<kWireMxfp4>(job, stream);
    case kWireFp8:
      return launch<kWireFp8>(job, stream);
    case kWireInt4:
      return launch<kWireInt4>(job, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t launch_wire_plain(const PlainJob& job, cudaStream_t stream) {
  const auto kernel = &plain_kernel;
  FP4DIST_LAUNCH(kernel, static_cast<unsigned>(job.number), 256, 0, stream, job);
  return cudaGetLastError();
}

}  // namespace fp4dist
