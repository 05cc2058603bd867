// The GEMMs' door: as ../bindings.cpp. Built where FP4DIST_CUTLASS names CUTLASS's headers (../build.py).

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <vector>

#include "gemm.h"

namespace fp4dist {
namespace {

using at::Tensor;
using at::TensorList;

// The GEMMs of the GPU with these operands; an error where none were compiled for it.
const Multiplier& multiplier(bool mx, int major) {
#ifdef FP4DIST_GEMM_SM100
  if (major == 10) return mx ? kSm100Mxfp4 : kSm100Nvfp4;
#endif
#ifdef FP4DIST_GEMM_SM120
  if (major == 12) return mx ? kSm120Mxfp4 : kSm120Nvfp4;
#endif
  TORCH_CHECK(false, "fp4dist::gemm: not compiled for compute capability ", major, ".x, mx ", mx,
              "; build with FP4DIST_CUTLASS and FP4DIST_CUDA_ARCHS for this GPU");
}

// Compute capabilities (major) that have GEMMs here.
std::vector<int64_t> gemm_capabilities() {
  std::vector<int64_t> found;
#ifdef FP4DIST_GEMM_SM100
  found.push_back(10);
#endif
#ifdef FP4DIST_GEMM_SM120
  found.push_back(12);
#endif
  return found;
}

const Tensor& part(const char* name, const Tensor& x, const Tensor& like, int64_t bytes) {
  TORCH_CHECK_VALUE(x.device() == like.device() && x.is_contiguous() && static_cast<int64_t>(x.nbytes()) >= bytes &&
                        reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0,
                    "fp4dist::gemm: ", name, " of shape ", x.sizes(), " on ", x.device(), " must be contiguous, on ",
                    like.device(), ", at 16 bytes and of ", bytes, " bytes at least");
  return x;
}

int64_t tiles(int64_t rows, int64_t columns, int64_t block) {
  return (rows + 127) / 128 * 128 * ((columns / block + 3) / 4 * 4);
}

Product product_of(const Tensor& a, const Tensor& a_scales, const Tensor& b, const Tensor& b_scales,
                   const Tensor& alpha, bool mx, const Tensor& out) {
  TORCH_CHECK_VALUE(a.is_cuda() && a.dim() == 2 && b.dim() == 2 && a.scalar_type() == at::kByte &&
                        b.scalar_type() == at::kByte && a.size(1) == b.size(1),
                    "fp4dist::gemm: A and B must be uint8 codes [m, k / 2] and [n, k / 2] on a GPU, got ", a.sizes(),
                    " and ", b.sizes());
  const int64_t m = a.size(0), n = b.size(0), k = a.size(1) * 2, block = mx ? 32 : 16;
  TORCH_CHECK_VALUE(m > 0 && n > 0 && k > 0 && k % 32 == 0 && n % 8 == 0 && m <= INT32_MAX && k <= INT32_MAX,
                    "fp4dist::gemm: [", m, ", ", k, "] x [", n, ", ", k, "]: k must be a multiple of 32, n of 8");
  TORCH_CHECK_VALUE(out.dim() == 2 && out.size(0) == m && out.size(1) == n, "fp4dist::gemm: out of shape ", out.sizes(),
                    " must be [", m, ", ", n, "]");
  TORCH_CHECK_TYPE(alpha.scalar_type() == at::kFloat && alpha.numel() == 1 && alpha.device() == a.device(),
                   "fp4dist::gemm: alpha must be one float32 on ", a.device());
  return {part("A", a, a, m * k / 2).const_data_ptr(),
          part("B", b, a, n * k / 2).const_data_ptr(),
          part("scales of A", a_scales, a, tiles(m, k, block)).const_data_ptr(),
          part("scales of B", b_scales, a, tiles(n, k, block)).const_data_ptr(),
          alpha.const_data_ptr<float>(),
          part("out", out, a, 0).mutable_data_ptr(),
          static_cast<int32_t>(m),
          static_cast<int32_t>(n),
          static_cast<int32_t>(k)};
}

void gemm(TensorList a, TensorList a_scales, TensorList b, TensorList b_scales, TensorList alpha, bool mx, bool add,
          TensorList out) {
  const size_t number = a.size();
  TORCH_CHECK_VALUE(number > 0 && number == a_scales.size() && number == b.size() && number == b_scales.size() &&
                        number == alpha.size() && number == out.size(),
                    "fp4dist::gemm: as many of each operand as of A (", number, ", at least one) are needed");
  std::vector<Product> products;
  for (size_t i = 0; i < number; ++i) {
    TORCH_CHECK_TYPE(out[i].scalar_type() == (add ? at::kFloat : at::kBFloat16), "fp4dist::gemm: out.dtype = ",
                     out[i].scalar_type(), "; sums are added to float32, or written in bfloat16");
    products.push_back(product_of(a[i], a_scales[i], b[i], b_scales[i], alpha[i], mx, out[i]));
  }
  const c10::cuda::CUDAGuard guard(a[0].device());
  int major = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, a[0].get_device()));
  const Multiplier& how = multiplier(mx, major);
  const GemmOutput output = add ? kAddFloat : kWriteBFloat16;
  int64_t bytes = 0;
  const char* fault = how.scratch(output, products.data(), static_cast<int32_t>(number), &bytes);
  TORCH_CHECK(fault == nullptr, "fp4dist::gemm: ", fault);
  const Tensor scratch = at::empty({bytes}, a[0].options().dtype(at::kByte));
  fault = how.multiply(output, products.data(), static_cast<int32_t>(number), scratch.mutable_data_ptr(),
                       c10::cuda::getCurrentCUDAStream());
  TORCH_CHECK(fault == nullptr, "fp4dist::gemm: ", fault);
}

}  // namespace
}  // namespace fp4dist

TORCH_LIBRARY_FRAGMENT(fp4dist, m) {
  m.def("gemm_capabilities() -> int[]", &fp4dist::gemm_capabilities);
  m.def(
      "gemm(Tensor[] a, Tensor[] a_scales, Tensor[] b, Tensor[] b_scales, Tensor[] alpha, bool mx, bool add,"
      " Tensor(a!)[] out) -> ()");
}

TORCH_LIBRARY_IMPL(fp4dist, CUDA, m) { m.impl("gemm", &fp4dist::gemm); }
