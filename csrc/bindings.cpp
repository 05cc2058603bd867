// The door between torch and the device code: schemas, checks, stream and device; no mathematics.
// Python reaches the operators as torch.ops.fp4dist.*, after importing fp4dist._C.

#include <Python.h>  // before every other header, as CPython asks

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "amax.h"

namespace fp4dist {
namespace {

FloatType float_type(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kBFloat16:
      return FloatType::kBFloat16;
    case at::kHalf:
      return FloatType::kHalf;
    case at::kFloat:
      return FloatType::kFloat;
    default:
      break;
  }
  TORCH_CHECK_TYPE(false, "fp4dist::amax: x.dtype = ", x.scalar_type(), " must be bfloat16, float16 or float32");
}

at::Tensor amax(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.numel() > 0, "fp4dist::amax: x of shape ", x.sizes(), " is empty; a maximum needs an element");
  // a maximum has no order, so a transposed or permuted dense tensor is read as it lies
  TORCH_CHECK_VALUE(x.is_non_overlapping_and_dense(), "fp4dist::amax: x of shape ", x.sizes(), " and strides ",
                    x.strides(), " has gaps or overlaps; call x.contiguous() first");
  const FloatType type = float_type(x);
  const c10::cuda::CUDAGuard guard(x.device());
  at::Tensor out = at::empty({}, x.options().dtype(at::kFloat));
  C10_CUDA_CHECK(launch_amax(x.const_data_ptr(), x.numel(), type, out.mutable_data_ptr<float>(),
                             c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace
}  // namespace fp4dist

TORCH_LIBRARY(fp4dist, m) {
  m.def("amax(Tensor x) -> Tensor");
}

TORCH_LIBRARY_IMPL(fp4dist, CUDA, m) {
  m.impl("amax", &fp4dist::amax);
}

// An empty module: importing it loads this library, whose static initializers register the operators above.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
