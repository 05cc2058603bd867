// The door of parts.h, as bindings.cpp is for the other kernels. Sizes are those of the tensors.

#include <Python.h>  // before every other header, as CPython asks

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>
#include <optional>

#include "parts.h"

namespace fp4dist {
namespace {

using at::Tensor;
using Optional = const std::optional<Tensor>&;

// A bf16 or fp32 matrix on a GPU.
void check_source(const char* op, const Tensor& x, bool bf16_alone) {
  TORCH_CHECK_VALUE(x.is_cuda(), "fp4dist::", op, ": the source is on ", x.device(), "; it must be on a GPU");
  TORCH_CHECK_TYPE(x.scalar_type() == at::kBFloat16 || (!bf16_alone && x.scalar_type() == at::kFloat), "fp4dist::", op,
                   ": source.dtype = ", x.scalar_type(), " must be bfloat16", bf16_alone ? "" : " or float32");
  TORCH_CHECK_VALUE(x.dim() == 2 && x.numel() > 0 && x.size(0) <= INT32_MAX && x.size(1) <= INT32_MAX, "fp4dist::", op,
                    ": the source of shape ", x.sizes(), " must be a matrix with elements");
}

void check_rows(const char* op, const Tensor& x) {
  TORCH_CHECK_VALUE(x.stride(1) == 1, "fp4dist::", op, ": rows of the source, of strides ", x.strides(),
                    ", must be contiguous");
}

// What stands beside `x`: there, of this type, on the same device, without gaps, of `number` elements, aligned.
void check_part(const char* op, const char* name, const Tensor& part, const Tensor& x, at::ScalarType type,
                int64_t number, int64_t align) {
  TORCH_CHECK_VALUE(part.device() == x.device(), "fp4dist::", op, ": ", name, " is on ", part.device(),
                    ", the source on ", x.device());
  TORCH_CHECK_TYPE(part.scalar_type() == type, "fp4dist::", op, ": ", name, ".dtype = ", part.scalar_type(),
                   " must be ", type);
  TORCH_CHECK_VALUE(part.is_contiguous() && part.numel() == number, "fp4dist::", op, ": ", name, " of shape ",
                    part.sizes(), " and strides ", part.strides(), " must have ", number, " elements and no gaps");
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(part.const_data_ptr()) % align == 0, "fp4dist::", op, ": ", name,
                    " must be aligned to ", align, " bytes");
}

int32_t extent(const Tensor& x, int64_t dim) { return static_cast<int32_t>(x.size(dim)); }

void take_channels(const Tensor& x, Optional chosen, bool by_row, bool mx, Optional rest, const Tensor& side) {
  const char* op = "take_channels";
  check_source(op, x, false);
  const bool turned = x.stride(1) != 1;
  TORCH_CHECK_VALUE(!turned || x.stride(0) == 1, "fp4dist::", op, ": rows or columns of the source, of strides ",
                    x.strides(), ", must be contiguous");
  const int64_t multiple = mx ? 32 : 16;
  TORCH_CHECK_VALUE(x.size(1) % multiple == 0, "fp4dist::", op, ": the source of shape ", x.sizes(),
                    " must have a multiple of ", multiple, " columns");
  TORCH_CHECK_VALUE(chosen.has_value() == rest.has_value(), "fp4dist::", op, ": chosen comes with rest");
  if (chosen) check_part(op, "chosen", *chosen, x, at::kByte, x.size(by_row ? 0 : 1), 1);
  if (rest) check_part(op, "rest", *rest, x, x.scalar_type(), x.numel(), 16);
  check_part(op, "side", side, x, x.scalar_type(), x.numel(), 16);
  const c10::cuda::CUDAGuard guard(x.device());
  const Take job{x.const_data_ptr(),
                 x.stride(turned ? 1 : 0),
                 x.scalar_type() == at::kFloat,
                 turned,
                 extent(x, 0),
                 extent(x, 1),
                 chosen ? chosen->const_data_ptr<uint8_t>() : nullptr,
                 by_row,
                 mx,
                 rest ? rest->mutable_data_ptr() : nullptr,
                 side.mutable_data_ptr()};
  C10_CUDA_CHECK(launch_take(job, c10::cuda::getCurrentCUDAStream()));
}

void hot_residual(const Tensor& x, const Tensor& codes, const Tensor& scales, const Tensor& outer, const Tensor& chosen,
                  at::IntArrayRef block, bool e8m0, const Tensor& side) {
  const char* op = "hot_residual";
  check_source(op, x, false);
  check_rows(op, x);
  TORCH_CHECK_VALUE(block.size() == 2 && block[0] > 0 && block[1] > 0 && block[1] % 16 == 0 &&
                        x.size(0) % block[0] == 0 && x.size(1) % block[1] == 0,
                    "fp4dist::", op, ": the source of shape ", x.sizes(), " does not fit blocks of ", block);
  check_part(op, "codes", codes, x, at::kByte, x.numel() / 2, 8);
  check_part(op, "scales", scales, x, at::kByte, x.size(0) / block[0] * (x.size(1) / block[1]), 1);
  check_part(op, "outer", outer, x, at::kFloat, 1, 4);
  check_part(op, "chosen", chosen, x, at::kByte, x.size(1), 1);
  check_part(op, "side", side, x, x.scalar_type(), x.numel(), 16);
  const c10::cuda::CUDAGuard guard(x.device());
  const Residual job{{x.const_data_ptr(), x.stride(0), x.scalar_type() == at::kFloat},
                     codes.const_data_ptr(),
                     scales.const_data_ptr<uint8_t>(),
                     outer.const_data_ptr<float>(),
                     chosen.const_data_ptr<uint8_t>(),
                     extent(x, 0),
                     extent(x, 1),
                     static_cast<int32_t>(block[0]),
                     static_cast<int32_t>(block[1]),
                     e8m0 ? kE8M0 : kE4M3,
                     side.mutable_data_ptr()};
  C10_CUDA_CHECK(launch_residual(job, c10::cuda::getCurrentCUDAStream()));
}

const uint16_t* words_of(const Tensor& x) { return static_cast<const uint16_t*>(x.const_data_ptr()); }

uint16_t* words_to(const Tensor& x) { return static_cast<uint16_t*>(x.mutable_data_ptr()); }

void clamp_rows(const Tensor& x, int64_t wanted, const Tensor& rest, Optional side) {
  const char* op = "clamp_rows";
  check_source(op, x, true);
  check_rows(op, x);
  TORCH_CHECK_VALUE(x.size(1) <= kLongestClamp && wanted >= 1 && wanted <= x.size(1), "fp4dist::", op,
                    ": takes rows of up to ", kLongestClamp, " elements and a rank among them, got ", x.size(1),
                    " and ", wanted);
  check_part(op, "rest", rest, x, at::kBFloat16, x.numel(), 16);
  if (side) check_part(op, "side", *side, x, at::kBFloat16, x.numel(), 16);
  const c10::cuda::CUDAGuard guard(x.device());
  const Clamp job{words_of(x),    x.stride(0), extent(x, 0), extent(x, 1), static_cast<int32_t>(wanted),
                  words_to(rest), side ? words_to(*side) : nullptr};
  C10_CUDA_CHECK(launch_clamp(job, c10::cuda::getCurrentCUDAStream()));
}

void take_largest(const Tensor& x, int64_t group, int64_t k, const Tensor& rest, const Tensor& side) {
  const char* op = "take_largest";
  check_source(op, x, true);
  check_rows(op, x);
  TORCH_CHECK_VALUE(group >= 8 && group <= kLongestGroup && (group & (group - 1)) == 0 && x.size(1) % group == 0 &&
                        k >= 1 && k <= group,
                    "fp4dist::", op, ": takes k of each group of a power of two from 8 to ", kLongestGroup,
                    " elements, got ", k, " of ", group, " and rows of ", x.size(1));
  check_part(op, "rest", rest, x, at::kBFloat16, x.numel(), 16);
  check_part(op, "side", side, x, at::kBFloat16, x.numel(), 16);
  const c10::cuda::CUDAGuard guard(x.device());
  const Largest job{words_of(x), x.stride(0), extent(x, 0), extent(x, 1), static_cast<int32_t>(group),
                    static_cast<int32_t>(k), words_to(rest), words_to(side)};
  C10_CUDA_CHECK(launch_largest(job, c10::cuda::getCurrentCUDAStream()));
}

void slope_offsets(const Tensor& u, at::ArrayRef<double> levels, const Tensor& out) {
  const char* op = "slope_offsets";
  TORCH_CHECK_VALUE(u.is_cuda() && u.scalar_type() == at::kFloat && u.is_contiguous() && u.numel() > 0, "fp4dist::", op,
                    ": u must be contiguous float32 with elements on a GPU, got ", u.scalar_type(), " ", u.sizes(),
                    " on ", u.device());
  TORCH_CHECK_VALUE(levels.size() >= 2 && levels.size() <= kMostLevels, "fp4dist::", op, ": takes 2 to ", kMostLevels,
                    " levels, got ", levels.size());
  check_part(op, "out", out, u, at::kDouble, u.numel(), 8);
  Offsets job{u.const_data_ptr<float>(), out.mutable_data_ptr<double>(), u.numel(), {},
              static_cast<int32_t>(levels.size()) - 1};
  std::copy(levels.begin(), levels.end(), job.levels);
  const c10::cuda::CUDAGuard guard(u.device());
  C10_CUDA_CHECK(launch_offsets(job, c10::cuda::getCurrentCUDAStream()));
}

void split_terms(const Tensor& x, const Tensor& first, const Tensor& second, const Tensor& third) {
  const char* op = "split_terms";
  TORCH_CHECK_VALUE(x.is_cuda() && x.scalar_type() == at::kFloat && x.is_contiguous() && x.numel() > 0, "fp4dist::", op,
                    ": x must be contiguous float32 with elements on a GPU, got ", x.scalar_type(), " ", x.sizes(),
                    " on ", x.device());
  for (const Tensor* term : {&first, &second, &third}) check_part(op, "a term", *term, x, at::kBFloat16, x.numel(), 16);
  const c10::cuda::CUDAGuard guard(x.device());
  const Terms job{x.const_data_ptr<float>(), {words_to(first), words_to(second), words_to(third)}, x.numel()};
  C10_CUDA_CHECK(launch_terms(job, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace
}  // namespace fp4dist

TORCH_LIBRARY_FRAGMENT(fp4dist, m) {
  m.def(
      "take_channels(Tensor x, Tensor? chosen, bool by_row, bool mx, Tensor(a!)? rest, Tensor(b!) side) -> ()");
  m.def(
      "hot_residual(Tensor x, Tensor codes, Tensor scales, Tensor outer, Tensor chosen, int[] block, bool e8m0,"
      " Tensor(a!) side) -> ()");
  m.def("clamp_rows(Tensor x, int wanted, Tensor(a!) rest, Tensor(b!)? side) -> ()");
  m.def("take_largest(Tensor x, int group, int k, Tensor(a!) rest, Tensor(b!) side) -> ()");
  m.def("slope_offsets(Tensor u, float[] levels, Tensor(a!) out) -> ()");
  m.def("split_terms(Tensor x, Tensor(a!) first, Tensor(b!) second, Tensor(c!) third) -> ()");
}

TORCH_LIBRARY_IMPL(fp4dist, CUDA, m) {
  m.impl("take_channels", &fp4dist::take_channels);
  m.impl("hot_residual", &fp4dist::hot_residual);
  m.impl("clamp_rows", &fp4dist::clamp_rows);
  m.impl("take_largest", &fp4dist::take_largest);
  m.impl("slope_offsets", &fp4dist::slope_offsets);
  m.impl("split_terms", &fp4dist::split_terms);
}
