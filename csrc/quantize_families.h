// The instances of quantize.cuh, spread over files so that they compile side by side.
#pragma once

#include "quantize.h"

namespace fp4dist {

using Launch = cudaError_t (*)(const Job&, cudaStream_t);
using LaunchPair = cudaError_t (*)(const Job&, const Job&, cudaStream_t);

Launch find_amax(const Job& job);
Launch find_amax_noisy(const Job& job);
Launch find_four_over_six(const Job& job);
Launch find_eden(const Job& job);
Launch find_power(const Job& job);
Launch find_quest(const Job& job);
Launch find_measure(const Job& job);
LaunchPair find_pair(const Job& row, const Job& column);

}  // namespace fp4dist
