// The wire codec's door: as bindings.cpp. fp4dist/comm/parts.py makes the tables, fp4dist/kernels/cuda/wire.py the
// numbers of a call.

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>

#include "wire_jobs.h"

namespace fp4dist {
namespace {

using at::Tensor;
using Optional = const std::optional<Tensor>&;

Vector vector_of(const char* op, const char* name, const Tensor& x, bool written) {
  TORCH_CHECK_VALUE(x.is_cuda(), "fp4dist::", op, ": ", name, " is on ", x.device(), "; it must be on a GPU");
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "fp4dist::", op, ": ", name,
                   ".dtype = ", x.scalar_type(), " must be bfloat16 or float32");
  return {written ? x.mutable_data_ptr() : const_cast<void*>(x.const_data_ptr()), x.scalar_type() == at::kFloat};
}

// What every call reads or writes beside vectors: on the device of `like`, of a type, without gaps, aligned.
void check(const char* op, const char* name, const Tensor& x, at::ScalarType type, const Tensor& like, int64_t align) {
  TORCH_CHECK_VALUE(x.device() == like.device(), "fp4dist::", op, ": ", name, " is on ", x.device(), ", not on ",
                    like.device());
  TORCH_CHECK_TYPE(x.scalar_type() == type, "fp4dist::", op, ": ", name, ".dtype = ", x.scalar_type(), " must be ",
                   type);
  TORCH_CHECK_VALUE(x.numel() == 0 || reinterpret_cast<uintptr_t>(x.const_data_ptr()) % align == 0, "fp4dist::", op,
                    ": ", name, " must be aligned to ", align, " bytes");
}

void check_table(const char* op, const Tensor& table, const Tensor& like) {
  check(op, "table", table, at::kLong, like, 8);
  TORCH_CHECK_VALUE(table.dim() == 2 && table.size(0) > 0 && table.size(1) == 4 && table.is_contiguous(), "fp4dist::",
                    op, ": table must be a contiguous [records, 4], got ", table.sizes());
}

WireJob checked(const char* op, const Tensor& table, const Tensor& like, at::IntArrayRef how,
                at::ArrayRef<double> factors) {
  TORCH_CHECK_VALUE(static_cast<int64_t>(how.size()) == kWireIntegers &&
                        static_cast<int64_t>(factors.size()) == kWireFloats,
                    "fp4dist::", op, ": a call has ", kWireIntegers, " integers and ", kWireFloats, " factors");
  check_table(op, table, like);
  WireJob job = wire_job_of(how.data(), factors.data());
  TORCH_CHECK_VALUE(job.chunk >= kShortest && job.chunk <= kLongest && (job.chunk & (job.chunk - 1)) == 0 &&
                        (job.rotation == 1 || job.rotation == 32 || job.rotation == 128) && job.programs > 0,
                    "fp4dist::", op, ": no records of ", job.chunk, " elements under a rotation of ", job.rotation);
  job.table = table.const_data_ptr<int64_t>();
  job.number = table.size(0);
  return job;
}

// The records [all, bytes] that a call writes.
void write_records(const char* op, WireJob& job, const Tensor& records, const Tensor& like) {
  check(op, "records", records, at::kByte, like, 4);
  TORCH_CHECK_VALUE(records.dim() == 2 && records.size(1) == wire_record_bytes(job.kind, job.chunk) &&
                        records.is_contiguous(),
                    "fp4dist::", op, ": records of shape ", records.sizes(), " must be contiguous rows of ",
                    wire_record_bytes(job.kind, job.chunk), " bytes");
  job.records = records.mutable_data_ptr<uint8_t>();
}

// The records [senders, all, bytes] that a call sums.
void read_sources(const char* op, WireJob& job, const Tensor& sources, const Tensor& ranks, Optional bad,
                  const Tensor& like) {
  const int64_t bytes = wire_record_bytes(job.kind, job.chunk);
  check(op, "sources", sources, at::kByte, like, 4);
  check(op, "ranks", ranks, at::kInt, like, 4);
  TORCH_CHECK_VALUE(sources.dim() == 3 && sources.size(0) > 0 && sources.size(2) == bytes && sources.stride(2) == 1 &&
                        sources.stride(1) == bytes && sources.stride(0) % 4 == 0,
                    "fp4dist::", op, ": sources of shape ", sources.sizes(), " and strides ", sources.strides(),
                    " must be [senders, records, ", bytes, "] with contiguous records");
  TORCH_CHECK_VALUE(ranks.is_contiguous() && ranks.numel() >= (job.per_rank ? sources.size(0) : 1), "fp4dist::", op,
                    ": ranks has ", ranks.numel(), " elements for ", sources.size(0), " senders");
  job.sources = sources.const_data_ptr<uint8_t>();
  job.senders = static_cast<int32_t>(sources.size(0));
  job.all_records = sources.size(1);
  job.source_bytes = sources.stride(0);
  job.ranks = ranks.const_data_ptr<int32_t>();
  if (!bad) return;
  check(op, "bad", *bad, at::kInt, like, 4);
  job.bad = static_cast<uint32_t*>(bad->mutable_data_ptr());
}

void wire_encode(const Tensor& x, const Tensor& table, const Tensor& records, at::IntArrayRef how,
                 at::ArrayRef<double> factors) {
  WireJob job = checked("wire_encode", table, x, how, factors);
  job.x = vector_of("wire_encode", "x", x, false);
  write_records("wire_encode", job, records, x);
  const c10::cuda::CUDAGuard guard(x.device());
  C10_CUDA_CHECK(launch_wire_encode(job, c10::cuda::getCurrentCUDAStream()));
}

void wire_sum(const Tensor& out, Optional own, const Tensor& sources, const Tensor& table, const Tensor& ranks,
              Optional bad, at::IntArrayRef how, at::ArrayRef<double> factors) {
  WireJob job = checked("wire_sum", table, out, how, factors);
  job.out = vector_of("wire_sum", "out", out, true);
  if (own) job.x = vector_of("wire_sum", "own", *own, false);
  read_sources("wire_sum", job, sources, ranks, bad, out);
  const c10::cuda::CUDAGuard guard(out.device());
  C10_CUDA_CHECK(launch_wire_sum(job, c10::cuda::getCurrentCUDAStream()));
}

void wire_recode(const Tensor& records, Optional own, const Tensor& sources, const Tensor& table, const Tensor& ranks,
                 Optional bad, at::IntArrayRef how, at::ArrayRef<double> factors) {
  WireJob job = checked("wire_recode", table, records, how, factors);
  write_records("wire_recode", job, records, records);
  if (own) job.x = vector_of("wire_recode", "own", *own, false);
  read_sources("wire_recode", job, sources, ranks, bad, records);
  const c10::cuda::CUDAGuard guard(records.device());
  C10_CUDA_CHECK(launch_wire_recode(job, c10::cuda::getCurrentCUDAStream()));
}

void wire_plain(const Tensor& out, Optional own, const Tensor& messages, const Tensor& table, int64_t unit,
                int64_t own_at, double factor) {
  check_table("wire_plain", table, out);
  TORCH_CHECK_VALUE(messages.dim() == 2 && messages.size(0) > 0 && messages.stride(1) == 1,
                    "fp4dist::wire_plain: messages of shape ", messages.sizes(), " and strides ", messages.strides(),
                    " must be [senders, elements] with contiguous rows");
  PlainJob job{};
  job.out = vector_of("wire_plain", "out", out, true);
  job.messages = vector_of("wire_plain", "messages", messages, false);
  if (own) job.own = vector_of("wire_plain", "own", *own, false);
  job.table = table.const_data_ptr<int64_t>();
  job.number = table.size(0);
  job.source_elements = messages.stride(0);
  job.unit = static_cast<int32_t>(unit);
  job.senders = static_cast<int32_t>(messages.size(0));
  job.own_at = static_cast<int32_t>(own_at);
  job.factor = static_cast<float>(factor);
  const c10::cuda::CUDAGuard guard(out.device());
  C10_CUDA_CHECK(launch_wire_plain(job, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace
}  // namespace fp4dist

TORCH_LIBRARY_FRAGMENT(fp4dist, m) {
  m.def("wire_encode(Tensor x, Tensor table, Tensor(a!) records, int[] how, float[] factors) -> ()");
  m.def(
      "wire_sum(Tensor(a!) out, Tensor? own, Tensor sources, Tensor table, Tensor ranks, Tensor(b!)? bad, int[] how,"
      " float[] factors) -> ()");
  m.def(
      "wire_recode(Tensor(a!) records, Tensor? own, Tensor sources, Tensor table, Tensor ranks, Tensor(b!)? bad,"
      " int[] how, float[] factors) -> ()");
  m.def(
      "wire_plain(Tensor(a!) out, Tensor? own, Tensor messages, Tensor table, int unit, int own_at, float factor)"
      " -> ()");
}

TORCH_LIBRARY_IMPL(fp4dist, CUDA, m) {
  m.impl("wire_encode", &fp4dist::wire_encode);
  m.impl("wire_sum", &fp4dist::wire_sum);
  m.impl("wire_recode", &fp4dist::wire_recode);
  m.impl("wire_plain", &fp4dist::wire_plain);
}
