// What recipes quantize from one reading of a matrix: dY for dgrad and wgrad, x for fprop and wgrad.
#include "quantize.cuh"

namespace fp4dist {

LaunchPair find_pair(const Job& row, const Job& column) {
  using Near = Side<16, 1, 1, kAmax, false>;
  using NearTurned = Side<16, 1, 16, kAmax, false>;
  using Noisy = Side<16, 1, 1, kAmax, true>;
  using NoisyTurned = Side<16, 1, 16, kAmax, true>;
  using NoisyTurned32 = Side<16, 1, 32, kAmax, true>;
  using BestOf = Side<16, 1, 1, kFourOverSix, false>;
  using Unbiased = Side<16, 1, 128, kEden, false>;
  using Power = Side<32, 1, 1, kFloor, false>;
  using PowerNoisy = Side<32, 1, 1, kFloor, true>;
  using PowerTurned = Side<32, 1, 32, kFloor, false>;
  using Amax = Side<16, 1, 1, kMeasure, false>;
  using AmaxTurned = Side<16, 1, 16, kMeasure, false>;
  using AmaxTurned32 = Side<16, 1, 32, kMeasure, false>;
  if (row.source != kBFloat16 || column.source != kBFloat16) return nullptr;
  for (const LaunchPair found :
       {pair_of<Near, Near>(row, column), pair_of<Near, Noisy>(row, column), pair_of<Near, NearTurned>(row, column),
        pair_of<Noisy, Noisy>(row, column), pair_of<Noisy, NoisyTurned>(row, column),
        pair_of<NoisyTurned32, NoisyTurned32>(row, column), pair_of<BestOf, NearTurned>(row, column),
        pair_of<Unbiased, Unbiased>(row, column), pair_of<PowerNoisy, PowerNoisy>(row, column),
        pair_of<PowerTurned, PowerTurned>(row, column), pair_of<Power, PowerTurned>(row, column),
        pair_of<PowerNoisy, PowerTurned>(row, column), pair_of<Amax, AmaxTurned>(row, column),
        pair_of<AmaxTurned32, AmaxTurned32>(row, column)}) {
    if (found) return found;
  }
  return nullptr;
}

}  // namespace fp4dist
