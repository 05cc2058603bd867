// The door of grid.h and filter.h, as bindings.cpp is for the other kernels. Sizes are read from the integers that the
// Python side packs (fp4dist/kernels/cuda/grids.py, filters.py); here they are held against the memory behind them.

#include <Python.h>  // before every other header, as CPython asks

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>

#include "filter.h"
#include "grid.h"

namespace fp4dist {
namespace {

using at::Tensor;
using Optional = const std::optional<Tensor>&;

void check_lengths(const char* op, at::IntArrayRef how, at::ArrayRef<double> factors, int64_t integers, int64_t reals) {
  TORCH_CHECK_VALUE(
      static_cast<int64_t>(how.size()) == integers && static_cast<int64_t>(factors.size()) == reals, "fp4dist::", op,
      ": a job has ", integers, " integers and ", reals, " factors, got ", how.size(), " and ", factors.size());
}

// Memory that a kernel reaches from the start of `part`: `bytes`, on the device of `source`.
void check_reach(const char* op, const char* name, Optional part, const Tensor& source, int64_t bytes, int64_t align) {
  if (!part) return;
  TORCH_CHECK_VALUE(part->device() == source.device(), "fp4dist::", op, ": ", name, " is on ", part->device(),
                    ", the source on ", source.device());
  const int64_t offset = part->storage_offset() * static_cast<int64_t>(part->element_size());
  TORCH_CHECK_VALUE(static_cast<int64_t>(part->storage().nbytes()) - offset >= bytes, "fp4dist::", op, ": ", name,
                    " of shape ", part->sizes(), " has fewer than the ", bytes, " bytes that are needed");
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(part->const_data_ptr()) % align == 0, "fp4dist::", op, ": ", name,
                    " must be aligned to ", align, " bytes");
}

const void* read_pointer(Optional part) { return part ? part->const_data_ptr() : nullptr; }

void* write_pointer(Optional part) { return part ? part->mutable_data_ptr() : nullptr; }

// A bf16 or fp32 matrix [rows, cols] with these strides.
void check_matrix(const char* op, const char* name, const Tensor& x, const Tensor& source, int64_t rows, int64_t cols,
                  int64_t row_stride, int64_t column_stride, bool wide) {
  TORCH_CHECK_VALUE(x.is_cuda(), "fp4dist::", op, ": ", name, " is on ", x.device(), "; it must be on a GPU");
  TORCH_CHECK_TYPE(x.scalar_type() == (wide ? at::kFloat : at::kBFloat16), "fp4dist::", op, ": ", name,
                   ".dtype = ", x.scalar_type(), " must be bfloat16 or float32, as the job says");
  TORCH_CHECK_VALUE(rows > 0 && cols > 0 && row_stride >= 0 && column_stride >= 0, "fp4dist::", op, ": ", name,
                    " of [", rows, ", ", cols, "] at strides ", row_stride, ", ", column_stride, " is no matrix");
  const int64_t reach = (rows - 1) * row_stride + (cols - 1) * column_stride + 1;
  check_reach(op, name, x, source, reach * (wide ? 4 : 2), wide ? 4 : 2);
}

GridJob checked(const char* op, const Tensor& source, const GridPointers& pointers, at::IntArrayRef how,
                at::ArrayRef<double> factors) {
  const int64_t tries =
      static_cast<int64_t>(how.size()) == kGridIntegers && how[12] == kSearch ? how[kGridIntegers - 3] : 0;
  check_lengths(op, how, factors, kGridIntegers, kGridFloats + tries);
  const GridJob job = grid_job_of(pointers, how.data(), factors.data());
  check_matrix(op, "the source", source, source, job.rows, job.cols, job.x.row_stride, job.x.column_stride, job.x.wide);
  const char* reason = why_not(job);
  TORCH_CHECK_VALUE(reason == nullptr, "fp4dist::", op, ": takes ", reason, ", got block [", job.block_rows, ", ",
                    job.block_cols, "], rotation ", job.rotation, ", outer tile ", job.tile);
  const int64_t whole = job.rule == kGiven ? 1 : job.block_cols;
  TORCH_CHECK_VALUE(job.rows % job.block_rows == 0 && job.cols % whole == 0 && job.cols % job.rotation == 0 &&
                        job.cols % job.tile == 0,
                    "fp4dist::", op, ": shape [", job.rows, ", ", job.cols, "] does not fit its blocks");
  return job;
}

void grid_quantize(const Tensor& source, Optional toward, Optional given, Optional outer, Optional when,
                   at::IntArrayRef how, at::ArrayRef<double> factors, const Tensor& codes, Optional scales,
                   Optional outers) {
  const char* op = "grid_quantize";
  GridJob job = checked(op, source,
                        {source.const_data_ptr(), read_pointer(toward), read_pointer(given), read_pointer(outer),
                         read_pointer(when), codes.mutable_data_ptr(), write_pointer(scales), write_pointer(outers)},
                        how, factors);
  const int64_t rows = job.rows, cols = job.cols, width = job.grid.packed ? cols / 2 : cols;
  if (job.rounding == kTowardAverage) {
    TORCH_CHECK_VALUE(toward.has_value(), "fp4dist::", op, ": this rounding takes a moving average");
    check_matrix(op, "toward", *toward, source, rows, cols, job.toward.row_stride, job.toward.column_stride,
                 job.toward.wide);
  }
  TORCH_CHECK_VALUE(codes.scalar_type() == at::kByte && codes.dim() == 2 && codes.size(0) == rows &&
                        codes.size(1) == width && codes.stride(1) == 1,
                    "fp4dist::", op, ": codes must be uint8 [", rows, ", ", width, "], got ", codes.sizes());
  job.code_stride = codes.stride(0);
  check_reach(op, "codes", codes, source, (rows - 1) * job.code_stride + width, 1);
  TORCH_CHECK_VALUE(job.rule == kGiven ? given.has_value() : scales.has_value(), "fp4dist::", op,
                    ": multipliers come with the job, or scales are written");
  TORCH_CHECK_VALUE((job.above != kOfTensor && job.above != kOfRows) || outer, "fp4dist::", op, ": outer is missing");
  TORCH_CHECK_VALUE((job.above == kNothing && !job.post_hoc) || outers, "fp4dist::", op, ": outers is missing");
  check_reach(op, "given", given, source, job.given_by_row ? 4 * rows : 4, 4);
  check_reach(op, "outer", outer, source, job.above == kOfRows ? 4 * rows : 4, 4);
  check_reach(op, "when", when, source, 8, 4);
  const int64_t blocks = rows / job.block_rows * (cols / job.block_cols);
  const bool wide = job.scale == kFloat32 || job.post_hoc;
  check_reach(op, "scales", scales, source, wide ? 4 * blocks : blocks, wide ? 4 : 1);
  const int64_t above = job.above == kOfTiles ? rows * (cols / job.tile) : job.above == kOfRows ? rows : 1;
  check_reach(op, "outers", outers, source, 4 * above, 4);
  const c10::cuda::CUDAGuard guard(source.device());
  C10_CUDA_CHECK(launch_grid(job, c10::cuda::getCurrentCUDAStream()));
}

void grid_largest(const Tensor& source, Optional when, at::IntArrayRef how, at::ArrayRef<double> factors, bool by_row,
                  const Tensor& top) {
  const char* op = "grid_largest";
  const GridJob job = checked(
      op, source, {source.const_data_ptr(), nullptr, nullptr, nullptr, read_pointer(when), nullptr, nullptr, nullptr},
      how, factors);
  check_reach(op, "when", when, source, 8, 4);
  check_reach(op, "top", top, source, by_row ? 4 * job.rows : 4, 4);
  const c10::cuda::CUDAGuard guard(source.device());
  C10_CUDA_CHECK(launch_grid_largest(job, by_row, static_cast<uint32_t*>(top.mutable_data_ptr()),
                                     c10::cuda::getCurrentCUDAStream()));
}

void grid_decode(const Tensor& codes, const Tensor& scales, const Tensor& factors, at::IntArrayRef how,
                 at::ArrayRef<double> levels, const Tensor& values) {
  const char* op = "grid_decode";
  check_lengths(op, how, levels, kDecodeIntegers, kLevels);
  TORCH_CHECK_VALUE(codes.is_cuda() && codes.scalar_type() == at::kByte, "fp4dist::", op,
                    ": codes must be uint8 on a GPU, got ", codes.scalar_type(), " on ", codes.device());
  const GridDecode job = grid_decode_of(codes.const_data_ptr(), scales.const_data_ptr(), factors.const_data_ptr(),
                                        how.data(), levels.data(), values.mutable_data_ptr());
  const int64_t rows = job.rows, cols = job.cols;
  TORCH_CHECK_VALUE(rows > 0 && cols > 0 && job.block_rows > 0 && job.block_cols > 0 && job.factor_rows > 0 &&
                        job.factor_cols > 0 && rows % job.block_rows == 0 && cols % job.block_cols == 0,
                    "fp4dist::", op, ": [", rows, ", ", cols, "] does not fit its blocks");
  constexpr int64_t kSizes[] = {4, 2, 1, 1};
  TORCH_CHECK_VALUE(job.to >= 0 && job.to < 4, "fp4dist::", op, ": to = ", job.to, " must be in [0, 4)");
  const int64_t blocks = rows / job.block_rows * (cols / job.block_cols);
  check_reach(op, "codes", codes, codes, (rows - 1) * job.code_stride + (job.packed ? cols / 2 : cols), 1);
  check_reach(op, "scales", scales, codes, job.scale == kFloat32 ? 4 * blocks : blocks, 1);
  check_reach(op, "factors", factors, codes, rows / job.factor_rows * (cols / job.factor_cols) * 4, 4);
  check_reach(op, "values", values, codes, rows * cols * kSizes[job.to], 16);
  const c10::cuda::CUDAGuard guard(codes.device());
  C10_CUDA_CHECK(launch_grid_decode(job, c10::cuda::getCurrentCUDAStream()));
}

struct FilterParts {
  Optional g, kept, x, scales, outer, when;
};

Filter checked_filter(const char* op, const Tensor& source, const FilterParts& p, at::IntArrayRef how,
                      at::ArrayRef<double> factors, const Tensor& out, int64_t out_bytes) {
  check_lengths(op, how, factors, kFilterIntegers, kFilterFloats);
  const Filter job = filter_of({read_pointer(p.g), read_pointer(p.kept), read_pointer(p.x), read_pointer(p.scales),
                                read_pointer(p.outer), read_pointer(p.when), out.mutable_data_ptr()},
                               how.data(), factors.data());
  const int64_t rows = job.rows, cols = job.cols;
  TORCH_CHECK_VALUE(rows > 0 && cols > 0 && cols % 16 == 0 && job.rotation >= 1 && job.rotation <= 128 &&
                        cols % job.rotation == 0 && job.block_rows > 0 && job.block_cols > 0 && job.outer_rows > 0 &&
                        job.outer_cols > 0,
                    "fp4dist::", op, ": [", rows, ", ", cols, "] must have a multiple of 16 columns and whole",
                    " rotations of ", job.rotation);
  const int64_t blocks = (rows + job.block_rows - 1) / job.block_rows * (cols / job.block_cols);
  const int64_t tiles = (rows + job.outer_rows - 1) / job.outer_rows * (cols / job.outer_cols);
  check_reach(op, "kept", p.kept, source, rows * cols / 8, 2);
  check_reach(op, "scales", p.scales, source, job.scale == kFloat32 ? 4 * blocks : blocks, 1);
  check_reach(op, "outer", p.outer, source, 4 * tiles, 4);
  check_reach(op, "when", p.when, source, 8, 4);
  TORCH_CHECK_VALUE(out.is_contiguous(), "fp4dist::", op, ": out of strides ", out.strides(), " must be contiguous");
  check_reach(op, "out", out, source, out_bytes ? out_bytes : rows * cols * (job.wide_out ? 4 : 2),
              job.wide_out ? 4 : out_bytes ? 2 : 16);
  return job;
}

void clip_mask(const Tensor& x, const Tensor& scales, const Tensor& outer, Optional when, at::IntArrayRef how,
               at::ArrayRef<double> factors, const Tensor& out) {
  const std::optional<Tensor> none;
  TORCH_CHECK_VALUE(how.size() > 1, "fp4dist::clip_mask: a job has ", kFilterIntegers, " integers");
  const Filter job =
      checked_filter("clip_mask", x, {none, none, x, scales, outer, when}, how, factors, out, how[0] * how[1] / 8);
  check_matrix("clip_mask", "x", x, x, job.rows, job.cols, job.x.stride, 1, job.x.wide);
  const c10::cuda::CUDAGuard guard(x.device());
  C10_CUDA_CHECK(launch_mask(job, c10::cuda::getCurrentCUDAStream()));
}

void clip_filter(const Tensor& gradient, Optional kept, Optional x, Optional scales, Optional outer, Optional when,
                 at::IntArrayRef how, at::ArrayRef<double> factors, const Tensor& out) {
  const Filter job =
      checked_filter("clip_filter", gradient, {gradient, kept, x, scales, outer, when}, how, factors, out, 0);
  check_matrix("clip_filter", "gradient", gradient, gradient, job.rows, job.cols, job.g.stride, 1, job.g.wide);
  TORCH_CHECK_VALUE(kept || (x && scales && outer), "fp4dist::clip_filter: takes bits, or x with its scales");
  TORCH_CHECK_VALUE(!job.add || job.wide_out, "fp4dist::clip_filter: adds to fp32 alone");
  if (x) check_matrix("clip_filter", "x", *x, gradient, job.rows, job.cols, job.x.stride, 1, job.x.wide);
  const c10::cuda::CUDAGuard guard(gradient.device());
  C10_CUDA_CHECK(launch_filter(job, c10::cuda::getCurrentCUDAStream()));
}

void turn_back(const Tensor& codes, const Tensor& scales, const Tensor& outer, Optional when, at::IntArrayRef how,
               at::ArrayRef<double> factors, const Tensor& out) {
  const std::optional<Tensor> none;
  TORCH_CHECK_VALUE(codes.is_cuda() && codes.scalar_type() == at::kByte && codes.is_contiguous(),
                    "fp4dist::turn_back: codes must be contiguous uint8 on a GPU");
  const Filter job =
      checked_filter("turn_back", codes, {none, none, codes, scales, outer, when}, how, factors, out, 0);
  check_reach("turn_back", "codes", codes, codes, static_cast<int64_t>(job.rows) * job.cols / 2, 8);
  const c10::cuda::CUDAGuard guard(codes.device());
  C10_CUDA_CHECK(launch_turn_back(job, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace
}  // namespace fp4dist

TORCH_LIBRARY_FRAGMENT(fp4dist, m) {
  m.def(
      "grid_quantize(Tensor source, Tensor? toward, Tensor? given, Tensor? outer, Tensor? when, int[] how,"
      " float[] factors, Tensor(a!) codes, Tensor(b!)? scales, Tensor(c!)? outers) -> ()");
  m.def("grid_largest(Tensor source, Tensor? when, int[] how, float[] factors, bool by_row, Tensor(a!) top) -> ()");
  m.def(
      "grid_decode(Tensor codes, Tensor scales, Tensor factors, int[] how, float[] levels, Tensor(a!) values) -> ()");
  m.def(
      "clip_mask(Tensor x, Tensor scales, Tensor outer, Tensor? when, int[] how, float[] factors, Tensor(a!) out)"
      " -> ()");
  m.def(
      "clip_filter(Tensor gradient, Tensor? kept, Tensor? x, Tensor? scales, Tensor? outer, Tensor? when, int[] how,"
      " float[] factors, Tensor(a!) out) -> ()");
  m.def(
      "turn_back(Tensor codes, Tensor scales, Tensor outer, Tensor? when, int[] how, float[] factors, Tensor(a!) out)"
      " -> ()");
}

TORCH_LIBRARY_IMPL(fp4dist, CUDA, m) {
  m.impl("grid_quantize", &fp4dist::grid_quantize);
  m.impl("grid_largest", &fp4dist::grid_largest);
  m.impl("grid_decode", &fp4dist::grid_decode);
  m.impl("clip_mask", &fp4dist::clip_mask);
  m.impl("clip_filter", &fp4dist::clip_filter);
  m.impl("turn_back", &fp4dist::turn_back);
}
