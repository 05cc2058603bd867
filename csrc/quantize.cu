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

// The E4M3 bytes of four neighbouring blocks from number `first` on, packed. They mostly share a draw of four words.
__device__ __forceinline__ uint32_t rounded_scales(const EdenScales& job, float divisor, uint32_t first, int number) {
  const auto blocks = static_cast<uint32_t>(job.blocks);
  const Moment now = moment(job.noise);
  uint32_t row = first / blocks, column = first % blocks, drawn = 0, packed = 0;
  Words words{};
  float corrected[4];
  if (number == 4) {
    const float4 v = __ldg(reinterpret_cast<const float4*>(job.corrected + first));
    corrected[0] = v.x, corrected[1] = v.y, corrected[2] = v.z, corrected[3] = v.w;
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) corrected[k] = k < number ? job.corrected[first + k] : 0.0f;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint64_t block =
        static_cast<uint64_t>(global_row(job.noise, row)) * job.noise.width + global_group(job.noise, column);
    const auto quad = static_cast<uint32_t>(block / 4);
    if (k == 0 || quad != drawn) words = draw(job.noise, now, quad);
    drawn = quad;
    const uint32_t which = block % 4;
    const uint32_t word = which == 0 ? words.w[0] : which == 1 ? words.w[1] : which == 2 ? words.w[2] : words.w[3];
    const uint32_t byte = e4m3_stochastic(__fdiv_rn(corrected[k], divisor), word);
    packed |= byte << (8 * k);
    if (job.scales && (job.swizzled || number < 4) && k < number) {
      job.scales[scale_at(row, static_cast<int>(column), job.blocks, job.swizzled != 0)] = static_cast<uint8_t>(byte);
    }
    if (++column == blocks) column = 0, ++row;
  }
  if (job.scales && !job.swizzled && number == 4) reinterpret_cast<uint32_t*>(job.scales)[first / 4] = packed;
  return packed;
}

__global__ void __launch_bounds__(kEdenThreads) eden_scales_kernel(const __grid_constant__ EdenScales job) {
  const uint32_t thread = blockIdx.x * kEdenThreads + threadIdx.x, first = 4 * thread;
  const auto number = static_cast<uint32_t>(job.number);
  const uint32_t found = *job.largest;
  const float shared = __fdiv_rn(floats(found < kInfinity ? found : kInfinity), job.budget);
  const float divisor = shared == 0.0f ? 1.0f : shared;
  if (thread == 0) *job.global_scale = (bits(shared) & 0x7fffffffu) < kInfinity ? divisor : not_a_number();
  // the 128 blocks of a warp, half a block a thread at a time: neighbours have neighbouring words and vectors. Codes
  // are on their way while scales are rounded
  const uint32_t lane = threadIdx.x % 32, half = 8 * (thread - lane) + lane;
  uint32_t codes[8] = {};
  if (job.values) {
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
      if (const uint32_t at = half + 32 * i; at / 2 < number) codes[i] = __ldg(job.codes + at);
    }
  }
  uint32_t packed = 0;
  if (first < number) packed = rounded_scales(job, divisor, first, number - first < 4 ? number - first : 4);
  if (!job.values) return;
#pragma unroll
  for (uint32_t i = 0; i < 8; ++i) {
    const uint32_t at = half + 32 * i;
    const uint32_t bytes = __shfl_sync(0xffffffffu, packed, static_cast<int>(4 * i + lane / 8));
    if (at / 2 >= number) continue;
    uint32_t out[4];
    bf16x8_values(codes[i], e4m3_value(bytes >> (8 * (lane / 2 % 4)) & 0xffu), out);
    reinterpret_cast<uint4*>(job.values)[at] = {out[0], out[1], out[2], out[3]};
  }
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
  if (job.number > INT32_MAX) return cudaErrorInvalidValue;
  const auto blocks = static_cast<unsigned>((job.number + 4 * kEdenThreads - 1) / (4 * kEdenThreads));
  FP4DIST_LAUNCH(eden_scales_kernel, blocks, kEdenThreads, 0, stream, job);
  return cudaGetLastError();
}

}  // namespace fp4dist
