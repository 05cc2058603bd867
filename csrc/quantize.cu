// Which instance a job runs; MS-EDEN's second stage.
#include "quantize.h"

#include "convert.cuh"
#include "noise.cuh"
#include "quantize_families.h"
#include "scales.cuh"

namespace fp4dist {
namespace {

constexpr int kEdenThreads = 256;

Launch find(const Job& job) {
  for (const auto family :
       {&find_amax, &find_amax_noisy, &find_four_over_six, &find_eden, &find_power, &find_quest, &find_measure}) {
    if (const Launch launch = family(job)) return launch;
  }
  return nullptr;
}

__global__ void __launch_bounds__(kEdenThreads) eden_scales_kernel(const __grid_constant__ EdenScales job) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kEdenThreads + threadIdx.x;
  if (i >= job.number) return;
  const float corrected = job.corrected[i];
  const uint32_t found = *job.largest;
  const float shared = __fdiv_rn(floats(found < kInfinity ? found : kInfinity), job.budget);
  const float divisor = shared == 0.0f ? 1.0f : shared;
  if (i == 0) *job.global_scale = (bits(shared) & 0x7fffffffu) < kInfinity ? divisor : not_a_number();
  const auto row = static_cast<uint32_t>(i / job.blocks), column = static_cast<uint32_t>(i % job.blocks);
  const uint64_t block =
      static_cast<uint64_t>(global_row(job.noise, row)) * job.noise.width + global_group(job.noise, column);
  const Words words = draw(job.noise, moment(job.noise), static_cast<uint32_t>(block / 4));
  const uint32_t which = block % 4;
  const uint32_t word = which == 0 ? words.w[0] : which == 1 ? words.w[1] : which == 2 ? words.w[2] : words.w[3];
  const uint32_t byte = e4m3_stochastic(__fdiv_rn(corrected, divisor), word);
  if (job.scales) {
    job.scales[scale_at(row, static_cast<int>(column), job.blocks, job.swizzled != 0)] = static_cast<uint8_t>(byte);
  }
  if (!job.values) return;
  const float scale = e4m3_value(byte);
  const uint2 codes = reinterpret_cast<const uint2*>(job.codes)[i];
  uint32_t out[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const uint32_t code = (j < 4 ? codes.x : codes.y) >> (8 * (j % 4));
    out[j] = bf16x2_exact(e2m1_value(code << 28) * scale, e2m1_value(code << 24) * scale);
  }
  auto* to = reinterpret_cast<uint4*>(job.values) + 2 * i;
  to[0] = {out[0], out[1], out[2], out[3]};
  to[1] = {out[4], out[5], out[6], out[7]};
}

}  // namespace

bool supported(const Job& job) { return find(job) != nullptr; }

bool supported_pair(const Job& row, const Job& column) { return find_pair(row, column) != nullptr; }

cudaError_t launch_quantize(const Job& job, cudaStream_t stream) {
  const Launch launch = find(job);
  return launch ? launch(job, stream) : cudaErrorInvalidValue;
}

cudaError_t launch_quantize_pair(const Job& row, const Job& column, cudaStream_t stream) {
  const LaunchPair launch = find_pair(row, column);
  return launch ? launch(row, column, stream) : cudaErrorInvalidValue;
}

cudaError_t launch_eden_scales(const EdenScales& job, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((job.number + kEdenThreads - 1) / kEdenThreads);
  FP4DIST_LAUNCH(eden_scales_kernel, blocks, kEdenThreads, 0, stream, job);
  return cudaGetLastError();
}

}  // namespace fp4dist
