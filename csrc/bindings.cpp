// The door between torch and the device code: schemas, checks, stream and device; no mathematics.
// Python reaches the operators as torch.ops.fp4dist.*, after importing fp4dist._C. What they write is allocated by the
// caller (fp4dist/kernels/cuda), so none but amax (4 bytes) allocates, and all can be captured in a CUDA graph.

#include <Python.h>  // before every other header, as CPython asks

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>

#include "amax.h"
#include "decode.h"
#include "jobs.h"
#include "quantize.h"

namespace fp4dist {
namespace {

using at::Tensor;
using Optional = const std::optional<Tensor>&;

FloatType float_type(const Tensor& x) {
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

Tensor amax(const Tensor& x) {
  TORCH_CHECK_VALUE(x.numel() > 0, "fp4dist::amax: x of shape ", x.sizes(), " is empty; a maximum needs an element");
  // a maximum has no order, so a transposed or permuted dense tensor is read as it lies
  TORCH_CHECK_VALUE(x.is_non_overlapping_and_dense(), "fp4dist::amax: x of shape ", x.sizes(), " and strides ",
                    x.strides(), " has gaps or overlaps; call x.contiguous() first");
  const FloatType type = float_type(x);
  const c10::cuda::CUDAGuard guard(x.device());
  Tensor out = at::empty({}, x.options().dtype(at::kFloat));
  C10_CUDA_CHECK(launch_amax(x.const_data_ptr(), x.numel(), type, out.mutable_data_ptr<float>(),
                             c10::cuda::getCurrentCUDAStream()));
  return out;
}

// What an operator writes or reads beside its source: there, on the same device, without gaps, of `bytes` at least, and
// aligned to 16 bytes where threads move vectors.
void check_part(const char* op, const char* name, Optional part, const Tensor& source, int64_t bytes, int64_t align) {
  if (!part) return;
  TORCH_CHECK_VALUE(part->device() == source.device(), "fp4dist::", op, ": ", name, " is on ", part->device(),
                    ", the source on ", source.device());
  TORCH_CHECK_VALUE(part->is_contiguous(), "fp4dist::", op, ": ", name, " of shape ", part->sizes(), " and strides ",
                    part->strides(), " must be contiguous");
  TORCH_CHECK_VALUE(static_cast<int64_t>(part->nbytes()) >= bytes, "fp4dist::", op, ": ", name, " has ", part->nbytes(),
                    " bytes, fewer than the ", bytes, " that are needed");
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(part->const_data_ptr()) % align == 0, "fp4dist::", op, ": ", name,
                    " must be aligned to ", align, " bytes");
}

const void* read_pointer(Optional part) { return part ? part->const_data_ptr() : nullptr; }

void* write_pointer(Optional part) { return part ? part->mutable_data_ptr() : nullptr; }

// One side of a quantization.
struct Parts {
  Optional q_scales, q_global, outer, when, codes, scales, values, top, global_scale, kept;
};

Job checked(const char* op, const Tensor& source, const Parts& p, at::IntArrayRef how, at::ArrayRef<double> factors) {
  TORCH_CHECK_VALUE(source.is_cuda(), "fp4dist::", op, ": the source is on ", source.device(), "; it must be on a GPU");
  TORCH_CHECK_VALUE(
      static_cast<int64_t>(how.size()) == kJobIntegers && static_cast<int64_t>(factors.size()) == kJobFloats,
      "fp4dist::", op, ": a job has ", kJobIntegers, " integers and ", kJobFloats, " factors, got ", how.size(),
      " and ", factors.size());
  const Job job = job_of({source.const_data_ptr(), read_pointer(p.q_scales), read_pointer(p.q_global),
                          read_pointer(p.outer), read_pointer(p.when), write_pointer(p.codes), write_pointer(p.scales),
                          write_pointer(p.values), write_pointer(p.top), write_pointer(p.global_scale),
                          write_pointer(p.kept)},
                         how.data(), factors.data());
  const auto type = source.scalar_type();
  const bool codes = job.source >= kCodesE4M3;
  TORCH_CHECK_TYPE(type == (codes                  ? at::kByte
                            : job.source == kFloat ? at::kFloat
                                                   : at::kBFloat16),
                   "fp4dist::", op, ": source.dtype = ", type, " does not fit source kind ", job.source,
                   " (0 bfloat16, 1 float32, 2 and 3 uint8 codes)");
  const int64_t rows = job.rows, cols = job.cols;
  TORCH_CHECK_VALUE(supported(job), "fp4dist::", op, ": no kernel for rule ", job.rule, ", block [", job.block_rows,
                    ", ", job.block_cols, "], rotation ", job.rotation, ", noise ", job.noisy);
  TORCH_CHECK_VALUE(
      rows > 0 && cols > 0 && rows % job.block_rows == 0 && cols % job.block_cols == 0 && cols % job.rotation == 0,
      "fp4dist::", op, ": shape [", rows, ", ", cols, "] does not fit blocks of [", job.block_rows, ", ",
      job.block_cols, "] and a rotation of ", job.rotation);
  TORCH_CHECK_VALUE(!codes || job.turned, "fp4dist::", op, ": codes are read transposed only");
  const int64_t lines = job.turned ? cols : rows, width = (job.turned ? rows : cols) / (codes ? 2 : 1);
  const int64_t reach = (lines - 1) * job.stride + width;
  const int64_t held =
      static_cast<int64_t>(source.storage().nbytes()) / source.element_size() - source.storage_offset();
  TORCH_CHECK_VALUE(job.stride >= width && reach <= held, "fp4dist::", op, ": ", lines, " lines of ", width,
                    " elements at stride ", job.stride, " reach beyond the source of shape ", source.sizes());
  const int64_t q_rows = codes ? job.q_rows : 1, q_cols = codes ? job.q_cols : 1;
  check_part(op, "q_scales", p.q_scales, source, codes ? lines / q_rows * (2 * width / q_cols) : 0, 1);
  check_part(op, "q_global", p.q_global, source, 4, 4);
  TORCH_CHECK_VALUE(!codes || (p.q_scales && p.q_global), "fp4dist::", op, ": codes come with q_scales and q_global");
  const bool outer = job.rule == kAmax || job.rule == kFourOverSix;
  TORCH_CHECK_VALUE(!outer || (p.outer && p.global_scale), "fp4dist::", op,
                    ": this rule needs the tensor's amax (outer) and writes global_scale");
  check_part(op, "outer", p.outer, source, 4, 4);
  check_part(op, "when", p.when, source, 8, 4);
  const int64_t blocks = rows / job.block_rows * (cols / job.block_cols);
  const int64_t tiles = (rows + 127) / 128 * 128 * ((cols / job.block_cols + 3) / 4 * 4);
  TORCH_CHECK_VALUE(job.rule != kEden || (p.codes && p.scales && p.top), "fp4dist::", op,
                    ": MS-EDEN writes codes, scales and top");
  TORCH_CHECK_VALUE(job.rule != kMeasure || p.top, "fp4dist::", op, ": a measurement writes top");
  check_part(op, "codes", p.codes, source, rows * cols / 2, 16);
  check_part(op, "scales", p.scales, source, job.rule == kEden ? 4 * blocks : job.swizzled ? tiles : blocks, 16);
  const bool powers = job.rule >= kFloor && job.rule <= kQuestNearest;
  TORCH_CHECK_VALUE(powers || (!p.kept && job.narrow == 0), "fp4dist::", op,
                    ": FP8 values and mask bits are of power-of-two scales, not of rule ", job.rule);
  const bool to_fp8 = job.narrow == kToE5M2 || job.narrow == kToE4M3;
  const bool small = job.rule == kCeil || (job.rule == kFloor && job.before < 0.875f);  // no element above 7 units
  const bool alone = small && !p.codes && !p.scales && !p.kept;
  TORCH_CHECK_VALUE(job.narrow == 0 || (p.top && ((to_fp8 && p.values && ((p.codes && p.scales) || alone)) ||
                                                  (job.narrow == kMisfitsAlone && p.codes && p.scales && !p.values))),
                    "fp4dist::", op, ": FP8 values (narrow 2 or 3, not ", job.narrow,
                    ") come with the slot's memory as top, and with codes and scales unless the rule is ceil, or floor "
                    "with headroom; narrow 4 has codes, scales and memory alone");
  check_part(op, "kept", p.kept, source, rows * cols / 8, 4);
  check_part(op, "values", p.values, source, rows * cols * (job.narrow ? 1 : 2), 16);
  check_part(op, "top", p.top, source, job.narrow ? 32 : 4, 4);
  check_part(op, "global_scale", p.global_scale, source, 4, 4);
  return job;
}

void quantize(const Tensor& source, Optional q_scales, Optional q_global, Optional outer, Optional when,
              at::IntArrayRef how, at::ArrayRef<double> factors, Optional codes, Optional scales, Optional values,
              Optional top, Optional global_scale, Optional kept) {
  const Parts parts{q_scales, q_global, outer, when, codes, scales, values, top, global_scale, kept};
  const Job job = checked("quantize", source, parts, how, factors);
  const c10::cuda::CUDAGuard guard(source.device());
  C10_CUDA_CHECK(launch_quantize(job, c10::cuda::getCurrentCUDAStream()));
}

void quantize_pair(const Tensor& source, Optional when, Optional outer, at::IntArrayRef how,
                   at::ArrayRef<double> factors, Optional codes, Optional scales, Optional values, Optional top,
                   Optional global_scale, Optional kept, Optional outer_t, at::IntArrayRef how_t,
                   at::ArrayRef<double> factors_t, Optional codes_t, Optional scales_t, Optional values_t,
                   Optional top_t, Optional global_scale_t, Optional kept_t) {
  const std::optional<Tensor> none;
  const Parts rows{none, none, outer, when, codes, scales, values, top, global_scale, kept};
  const Parts columns{none, none, outer_t, when, codes_t, scales_t, values_t, top_t, global_scale_t, kept_t};
  const Job row = checked("quantize_pair", source, rows, how, factors);
  const Job column = checked("quantize_pair", source, columns, how_t, factors_t);
  TORCH_CHECK_VALUE(
      !row.turned && column.turned && row.rows == column.cols && row.cols == column.rows &&
          row.stride == column.stride && supported_pair(row, column),
      "fp4dist::quantize_pair: these are not a bf16 matrix and its transpose under two specs with a kernel");
  const c10::cuda::CUDAGuard guard(source.device());
  C10_CUDA_CHECK(launch_quantize_pair(row, column, c10::cuda::getCurrentCUDAStream()));
}

void eden_scales(const Tensor& corrected, const Tensor& largest, const Tensor& codes, Optional when, int64_t columns,
                 double budget, bool swizzled, at::IntArrayRef place, Optional scales, Optional values,
                 const Tensor& global_scale) {
  const int64_t number = corrected.numel();
  TORCH_CHECK_VALUE(corrected.is_cuda() && corrected.scalar_type() == at::kFloat && corrected.is_contiguous() &&
                        columns > 0 && number > 0 && number % columns == 0,
                    "fp4dist::eden_scales: corrected must be contiguous float32 on a GPU, whole rows of ", columns);
  TORCH_CHECK_VALUE(static_cast<int64_t>(place.size()) == kPlaceIntegers, "fp4dist::eden_scales: a place has ",
                    kPlaceIntegers, " integers, got ", place.size());
  const int64_t tiles = (number / columns + 127) / 128 * 128 * ((columns + 3) / 4 * 4);
  check_part("eden_scales", "largest", largest, corrected, 4, 4);
  check_part("eden_scales", "codes", codes, corrected, number * 8, 16);
  check_part("eden_scales", "when", when, corrected, 8, 4);
  check_part("eden_scales", "corrected", corrected, corrected, number * 4, 16);
  check_part("eden_scales", "scales", scales, corrected, swizzled ? tiles : number, 4);
  check_part("eden_scales", "values", values, corrected, number * 32, 16);
  check_part("eden_scales", "global_scale", global_scale, corrected, 4, 4);
  const EdenScales job{corrected.const_data_ptr<float>(),
                       static_cast<const uint32_t*>(largest.const_data_ptr()),
                       static_cast<const uint32_t*>(codes.const_data_ptr()),
                       number,
                       static_cast<int32_t>(columns),
                       static_cast<float>(budget),
                       place_of(place.data(), place.data() + 5, read_pointer(when)),
                       static_cast<uint8_t*>(write_pointer(scales)),
                       static_cast<uint32_t*>(write_pointer(values)),
                       global_scale.mutable_data_ptr<float>(),
                       swizzled};
  const c10::cuda::CUDAGuard guard(corrected.device());
  C10_CUDA_CHECK(launch_eden_scales(job, c10::cuda::getCurrentCUDAStream()));
}

void decode(const Tensor& codes, const Tensor& scales, const Tensor& global_scale, at::IntArrayRef block, bool e8m0,
            bool turned, int64_t to, double factor, Optional top, const Tensor& values, Optional scale, Optional lost,
            Optional memory) {
  TORCH_CHECK_VALUE(codes.is_cuda() && codes.scalar_type() == at::kByte && codes.dim() == 2 && codes.is_contiguous(),
                    "fp4dist::decode: codes must be a contiguous uint8 matrix on a GPU, got ", codes.scalar_type(), " ",
                    codes.sizes(), " on ", codes.device());
  const int64_t rows = codes.size(0), cols = codes.size(1) * 2;
  TORCH_CHECK_VALUE(block.size() == 2 && block[0] > 0 && block[1] >= 8 && block[1] % 8 == 0 && rows % block[0] == 0 &&
                        cols % block[1] == 0 && (!turned || block[0] % 8 == 0),
                    "fp4dist::decode: codes of [", rows, ", ", cols, "] elements do not fit blocks of ", block);
  constexpr int64_t kSizes[] = {4, 2, 1, 1};
  TORCH_CHECK_VALUE(to >= 0 && to < 4, "fp4dist::decode: to = ", to,
                    " must be 0 (fp32), 1 (bf16), 2 (e5m2) or 3 (e4m3)");
  TORCH_CHECK_VALUE(to < 2 || (e8m0 && (top || memory) && scale && lost),
                    "fp4dist::decode: FP8 needs E8M0 scales, top or memory, scale and lost");
  TORCH_CHECK_VALUE(!memory || (to >= 2 && !turned), "fp4dist::decode: a memory is of FP8 and of codes as they lie");
  check_part("decode", "memory", memory, codes, 32, 4);
  check_part("decode", "codes", codes, codes, 0, 4);
  check_part("decode", "scales", scales, codes, rows / block[0] * (cols / block[1]), 1);
  check_part("decode", "global_scale", global_scale, codes, 4, 4);
  check_part("decode", "top", top, codes, 4, 4);
  check_part("decode", "values", values, codes, rows * cols * kSizes[to], 16);
  check_part("decode", "scale", scale, codes, 4, 4);
  check_part("decode", "lost", lost, codes, 4, 4);
  const Decode job{{codes.const_data_ptr<uint8_t>(), scales.const_data_ptr<uint8_t>(),
                    global_scale.const_data_ptr<float>(), e8m0, static_cast<int32_t>(rows), static_cast<int32_t>(cols),
                    static_cast<int32_t>(block[0]), static_cast<int32_t>(block[1])},
                   static_cast<int32_t>(to),
                   turned,
                   static_cast<float>(factor),
                   static_cast<const uint32_t*>(read_pointer(top)),
                   values.mutable_data_ptr(),
                   static_cast<float*>(write_pointer(scale)),
                   static_cast<uint32_t*>(write_pointer(lost)),
                   static_cast<uint32_t*>(write_pointer(memory))};
  const c10::cuda::CUDAGuard guard(codes.device());
  C10_CUDA_CHECK(launch_decode(job, c10::cuda::getCurrentCUDAStream()));
}

void largest_byte(const Tensor& scales, const Tensor& top) {
  TORCH_CHECK_VALUE(scales.is_cuda() && scales.scalar_type() == at::kByte && scales.is_contiguous(),
                    "fp4dist::largest_byte: scales must be contiguous uint8 on a GPU");
  check_part("largest_byte", "top", top, scales, 4, 4);
  const c10::cuda::CUDAGuard guard(scales.device());
  C10_CUDA_CHECK(launch_largest_byte(scales.const_data_ptr<uint8_t>(), scales.numel(),
                                     static_cast<uint32_t*>(top.mutable_data_ptr()),
                                     c10::cuda::getCurrentCUDAStream()));
}

void swizzle(const Tensor& scales, int64_t repeat, const Tensor& out) {
  TORCH_CHECK_VALUE(
      scales.is_cuda() && scales.scalar_type() == at::kByte && scales.dim() == 2 && scales.is_contiguous(),
      "fp4dist::swizzle: scales must be a contiguous uint8 matrix on a GPU");
  const int64_t rows = scales.size(0), cols = scales.size(1);
  check_part("swizzle", "out", out, scales, (rows * repeat + 127) / 128 * 128 * ((cols + 3) / 4 * 4), 1);
  const c10::cuda::CUDAGuard guard(scales.device());
  C10_CUDA_CHECK(launch_swizzle(scales.const_data_ptr<uint8_t>(), static_cast<int32_t>(rows),
                                static_cast<int32_t>(cols), static_cast<int32_t>(repeat),
                                out.mutable_data_ptr<uint8_t>(), c10::cuda::getCurrentCUDAStream()));
}

}  // namespace
}  // namespace fp4dist

TORCH_LIBRARY(fp4dist, m) {
  m.def("amax(Tensor x) -> Tensor");
  m.def(
      "quantize(Tensor source, Tensor? q_scales, Tensor? q_global, Tensor? outer, Tensor? when, int[] how,"
      " float[] factors, Tensor(a!)? codes, Tensor(b!)? scales, Tensor(c!)? values, Tensor(d!)? top,"
      " Tensor(e!)? global_scale, Tensor(f!)? kept) -> ()");
  m.def(
      "quantize_pair(Tensor source, Tensor? when, Tensor? outer, int[] how, float[] factors, Tensor(a!)? codes,"
      " Tensor(b!)? scales, Tensor(c!)? values, Tensor(d!)? top, Tensor(e!)? global_scale, Tensor(f!)? kept,"
      " Tensor? outer_t, int[] how_t, float[] factors_t, Tensor(g!)? codes_t, Tensor(h!)? scales_t,"
      " Tensor(i!)? values_t, Tensor(j!)? top_t, Tensor(k!)? global_scale_t, Tensor(l!)? kept_t) -> ()");
  m.def(
      "eden_scales(Tensor corrected, Tensor largest, Tensor codes, Tensor? when, int columns, float budget,"
      " bool swizzled, int[] place, Tensor(a!)? scales, Tensor(b!)? values, Tensor(c!) global_scale) -> ()");
  m.def(
      "decode(Tensor codes, Tensor scales, Tensor global_scale, int[] block, bool e8m0, bool turned, int to,"
      " float factor, Tensor? top, Tensor(a!) values, Tensor(b!)? scale, Tensor(c!)? lost, Tensor(d!)? memory) -> ()");
  m.def("largest_byte(Tensor scales, Tensor(a!) top) -> ()");
  m.def("swizzle(Tensor scales, int repeat, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(fp4dist, CUDA, m) {
  m.impl("amax", &fp4dist::amax);
  m.impl("quantize", &fp4dist::quantize);
  m.impl("quantize_pair", &fp4dist::quantize_pair);
  m.impl("eden_scales", &fp4dist::eden_scales);
  m.impl("decode", &fp4dist::decode);
  m.impl("largest_byte", &fp4dist::largest_byte);
  m.impl("swizzle", &fp4dist::swizzle);
}

// An empty module: importing it loads this library, whose static initializers register the operators above.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
