// Where CUTLASS's own layouts put scales and codes, for a comparison with ours: host code alone, compiled by nvcc.
// Prints, for each problem "m n k block" of the arguments: size of A's scales, then the place of A's scale of every row
// and block, then those of B's.
#include <cutlass/detail/sm100_blockscaled_layout.hpp>

#include <cstdio>
#include <cstdlib>

template <int BLOCK>
void print(int m, int n, int k) {
  using Config = cutlass::detail::Sm1xxBlockScaledConfig<BLOCK>;
  const auto problem = cute::make_shape(m, n, k, 1);
  const auto a = Config::tile_atom_to_shape_SFA(problem), b = Config::tile_atom_to_shape_SFB(problem);
  std::printf("%d %d\n", static_cast<int>(cute::cosize(a)), static_cast<int>(cute::cosize(b)));
  for (int row = 0; row < m; ++row) {
    for (int at = 0; at < k; at += BLOCK) std::printf("%d ", static_cast<int>(a(row, at, 0)));
  }
  std::printf("\n");
  for (int row = 0; row < n; ++row) {
    for (int at = 0; at < k; at += BLOCK) std::printf("%d ", static_cast<int>(b(row, at, 0)));
  }
  std::printf("\n");
}

int main(int count, char** words) {
  for (int i = 1; i + 3 < count; i += 4) {
    const int m = std::atoi(words[i]), n = std::atoi(words[i + 1]), k = std::atoi(words[i + 2]);
    std::atoi(words[i + 3]) == 16 ? print<16>(m, n, k) : print<32>(m, n, k);
  }
}
