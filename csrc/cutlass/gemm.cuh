// The GEMMs as CUTLASS's collectives put them together; one instance a format, an output, and one product or many.
//
// Why not torch's: `scaled_mm` has no fp32 C to add to (a weight gradient then costs a product in fp32, written, read
// and added), and `scaled_grouped_mm` takes one pair of tensor scales for all groups, where experts have their own.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/kernel_hardware_info.h>

#include "gemm.h"

namespace fp4dist {

namespace g = cutlass::gemm;
namespace e = cutlass::epilogue;
using cute::_1;
using cute::_128;
using cute::_2;
using cute::_256;

// Pairs of multiprocessors with tensor memory. The tile was not measured: no such machine was at hand.
struct Sm100 {
  using Tag = cutlass::arch::Sm100;
  using Tile = cute::Shape<_256, _128, _256>;
  using Cluster = cute::Shape<_2, _1, _1>;
  template <bool MX, bool MANY>
  using Mainloop = std::conditional_t<
      MANY, std::conditional_t<MX, g::KernelPtrArrayTmaWarpSpecialized2SmMxf4Sm100,
                               g::KernelPtrArrayTmaWarpSpecialized2SmNvf4Sm100>,
      std::conditional_t<MX, g::KernelTmaWarpSpecialized2SmMxf4Sm100, g::KernelTmaWarpSpecialized2SmNvf4Sm100>>;
  template <bool MANY>
  using Epilogue = std::conditional_t<MANY, e::PtrArrayTmaWarpSpecialized2Sm, e::TmaWarpSpecialized2Sm>;
};

// Warp-level MMA, no clusters. Likewise.
struct Sm120 {
  using Tag = cutlass::arch::Sm120;
  using Tile = cute::Shape<_128, _128, _128>;
  using Cluster = cute::Shape<_1, _1, _1>;
  template <bool MX, bool MANY>
  using Mainloop = g::collective::KernelScheduleAuto;
  template <bool MANY>
  using Epilogue = e::collective::EpilogueScheduleAuto;
};

template <class Arch, bool MX, GemmOutput OUTPUT, bool MANY>
struct Gemm {
  using Element = std::conditional_t<MX, cutlass::mx_float4_t<cutlass::float_e2m1_t>,
                                     cutlass::nv_float4_t<cutlass::float_e2m1_t>>;
  using Out = std::conditional_t<OUTPUT == kWriteBFloat16, cutlass::bfloat16_t, float>;
  using Added = std::conditional_t<OUTPUT == kAddFloat, float, void>;
  template <class Layout>
  using Of = std::conditional_t<MANY, Layout*, Layout>;
  using Rows = Of<cutlass::layout::RowMajor>;
  using Columns = Of<cutlass::layout::ColumnMajor>;
  using Operator = cutlass::arch::OpClassBlockScaledTensorOp;
  static constexpr int kVector = 16 / sizeof(Out), kCodes = 32;  // 16 bytes

  using Epilogue = typename e::collective::CollectiveBuilder<
      typename Arch::Tag, Operator, typename Arch::Tile, typename Arch::Cluster, e::collective::EpilogueTileAuto, float,
      float, Added, Rows, kVector, Out, Rows, kVector, typename Arch::template Epilogue<MANY>>::CollectiveOp;
  using Mainloop = typename g::collective::CollectiveBuilder<
      typename Arch::Tag, Operator, Element, Rows, kCodes, Element, Columns, kCodes, float, typename Arch::Tile,
      typename Arch::Cluster,
      g::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      typename Arch::template Mainloop<MX, MANY>>::CollectiveOp;
  using One = cute::Shape<int, int, int>;
  using Problem = std::conditional_t<MANY, g::GroupProblemShape<One>, cute::Shape<int, int, int, int>>;
  using Kernel = g::kernel::GemmUniversal<Problem, Mainloop, Epilogue, void>;
  using Device = g::device::GemmUniversalAdapter<Kernel>;
  using Arguments = typename Device::Arguments;

  using Code = typename Device::ElementA;
  using ScaleByte = typename Mainloop::ElementSF;
  using Scales = typename Mainloop::Sm1xxBlkScaledConfig;
  using StrideA = std::remove_pointer_t<typename Kernel::StrideA>;
  using StrideB = std::remove_pointer_t<typename Kernel::StrideB>;
  using StrideOut = std::remove_pointer_t<typename Kernel::StrideD>;
  using LayoutOfScales = std::remove_pointer_t<typename Mainloop::LayoutSFA>;
};

// ---- one product ----------------------------------------------------------------------------------------------------

template <class G>
typename G::Arguments arguments_of(const Product& p) {
  const auto problem = cute::make_shape(p.m, p.n, p.k, 1);
  typename G::Arguments arguments{};
  arguments.mode = g::GemmUniversalMode::kGemm;
  arguments.problem_shape = problem;
  auto& in = arguments.mainloop;
  in.ptr_A = static_cast<decltype(in.ptr_A)>(p.a);
  in.ptr_B = static_cast<decltype(in.ptr_B)>(p.b);
  in.dA = cute::make_stride(static_cast<int64_t>(p.k), _1{}, int64_t{0});
  in.dB = cute::make_stride(static_cast<int64_t>(p.k), _1{}, int64_t{0});
  in.ptr_SFA = static_cast<decltype(in.ptr_SFA)>(p.a_scales);
  in.ptr_SFB = static_cast<decltype(in.ptr_SFB)>(p.b_scales);
  in.layout_SFA = G::Scales::tile_atom_to_shape_SFA(problem);
  in.layout_SFB = G::Scales::tile_atom_to_shape_SFB(problem);
  auto& out = arguments.epilogue;
  out.ptr_D = static_cast<decltype(out.ptr_D)>(p.out);
  out.dD = cute::make_stride(static_cast<int64_t>(p.n), _1{}, int64_t{0});
  if constexpr (!std::is_void_v<typename G::Epilogue::ElementC>) {
    out.ptr_C = static_cast<decltype(out.ptr_C)>(p.out);  // each tile is read before it is written
    out.dC = out.dD;
    out.thread.beta = 1.0f;
  }
  out.thread.alpha_ptr = p.alpha;
  return arguments;
}

// ---- many products --------------------------------------------------------------------------------------------------

// What a grouped kernel reads of all groups, as arrays in device memory.
template <class G>
struct Table {
  typename G::One* shapes;
  const typename G::Code **a, **b;
  const typename G::ScaleByte **a_scales, **b_scales;
  typename G::StrideA* a_strides;
  typename G::StrideB* b_strides;
  typename G::LayoutOfScales *a_layouts, *b_layouts;
  typename G::Out** out;
  typename G::StrideOut* out_strides;
  const float** alphas;

  // Places the arrays in `memory` (null: counts only); the bytes that they take.
  int64_t place(void* memory, int64_t number) {
    int64_t used = 0;
    const auto put = [&](auto*& array) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(static_cast<char*>(memory) + used);
      used += (number * static_cast<int64_t>(sizeof(*array)) + 255) / 256 * 256;
    };
    put(shapes), put(a), put(b), put(a_scales), put(b_scales), put(a_strides), put(b_strides), put(a_layouts);
    put(b_layouts), put(out), put(out_strides), put(alphas);
    return used;
  }
};

constexpr int kProductsPerLaunch = 48;  // kernels take 4 KiB of parameters

struct Products {
  Product of[kProductsPerLaunch];
};

// Fills a table from products that come as a launch's parameters, which a CUDA graph keeps.
template <class G>
__global__ void fill_table(const __grid_constant__ Products products, int first, int number, Table<G> to) {
  const int i = threadIdx.x;
  if (i >= number) return;
  const Product& p = products.of[i];
  const int at = first + i;
  to.shapes[at] = cute::make_shape(p.m, p.n, p.k);
  to.a[at] = static_cast<const typename G::Code*>(p.a);
  to.b[at] = static_cast<const typename G::Code*>(p.b);
  to.a_scales[at] = static_cast<const typename G::ScaleByte*>(p.a_scales);
  to.b_scales[at] = static_cast<const typename G::ScaleByte*>(p.b_scales);
  to.a_strides[at] = cute::make_stride(static_cast<int64_t>(p.k), _1{}, cute::_0{});
  to.b_strides[at] = cute::make_stride(static_cast<int64_t>(p.k), _1{}, cute::_0{});
  to.a_layouts[at] = G::Scales::tile_atom_to_shape_SFA(cute::make_shape(p.m, p.n, p.k, 1));
  to.b_layouts[at] = G::Scales::tile_atom_to_shape_SFB(cute::make_shape(p.m, p.n, p.k, 1));
  to.out[at] = static_cast<typename G::Out*>(p.out);
  to.out_strides[at] = cute::make_stride(static_cast<int64_t>(p.n), _1{}, cute::_0{});
  to.alphas[at] = p.alpha;
}

template <class G>
typename G::Arguments arguments_of(const Table<G>& table, int32_t number) {
  typename G::Arguments arguments{};
  arguments.mode = g::GemmUniversalMode::kGrouped;
  arguments.problem_shape = {number, table.shapes, nullptr};
  auto& in = arguments.mainloop;
  in.ptr_A = reinterpret_cast<decltype(in.ptr_A)>(table.a);
  in.ptr_B = reinterpret_cast<decltype(in.ptr_B)>(table.b);
  in.dA = table.a_strides;
  in.dB = table.b_strides;
  in.ptr_SFA = table.a_scales;
  in.ptr_SFB = table.b_scales;
  in.layout_SFA = table.a_layouts;
  in.layout_SFB = table.b_layouts;
  auto& out = arguments.epilogue;
  out.ptr_D = table.out;
  out.dD = table.out_strides;
  if constexpr (!std::is_void_v<typename G::Epilogue::ElementC>) {
    out.ptr_C = const_cast<decltype(out.ptr_C)>(table.out);
    out.dC = table.out_strides;
    out.thread.beta = 1.0f;
  }
  out.thread.alpha_ptr_array = table.alphas;
  out.thread.dAlpha = {cute::_0{}, cute::_0{}, 1};
  return arguments;
}

// ---- doors ----------------------------------------------------------------------------------------------------------

inline const char* said(cutlass::Status status) {
  return status == cutlass::Status::kSuccess ? nullptr : cutlassGetStatusString(status);
}

// `arguments` with what CUTLASS asks of the device, under an error's name or null.
template <class G>
const char* on_this_device(typename G::Arguments& arguments) {
  auto& device = arguments.hw_info;
  if (const cudaError_t error = cudaGetDevice(&device.device_id)) return cudaGetErrorString(error);
  device.sm_count = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(device.device_id);
  return nullptr;
}

template <class G, bool MANY>
const char* scratch_of(const Product* products, int32_t number, int64_t* bytes) {
  Table<G> table{};
  *bytes = MANY ? table.place(nullptr, number) : 0;
  typename G::Arguments arguments;
  if constexpr (MANY) {
    arguments = arguments_of<G>(table, number);
  } else {
    arguments = arguments_of<G>(*products);
  }
  if (const char* fault = on_this_device<G>(arguments)) return fault;
  if (const char* fault = said(G::Device::can_implement(arguments))) return fault;
  *bytes += static_cast<int64_t>(G::Device::get_workspace_size(arguments));
  return nullptr;
}

template <class G, bool MANY>
const char* multiply(const Product* products, int32_t number, void* scratch, cudaStream_t stream) {
  typename G::Arguments arguments;
  if constexpr (MANY) {
    Table<G> table{};
    const int64_t used = table.place(scratch, number);
    for (int first = 0; first < number; first += kProductsPerLaunch) {
      Products some{};
      const int here = number - first < kProductsPerLaunch ? number - first : kProductsPerLaunch;
      for (int i = 0; i < here; ++i) some.of[i] = products[first + i];
      fill_table<G><<<1, 64, 0, stream>>>(some, first, here, table);
    }
    if (const cudaError_t error = cudaGetLastError()) return cudaGetErrorString(error);
    arguments = arguments_of<G>(table, number);
    scratch = static_cast<char*>(scratch) + used;
  } else {
    arguments = arguments_of<G>(*products);
  }
  if (const char* fault = on_this_device<G>(arguments)) return fault;
  typename G::Device gemm;
  if (const char* fault = said(gemm.initialize(arguments, scratch, stream))) return fault;
  return said(gemm.run(stream));
}

// The instances: one product that is added to fp32, and many that are added or written.
template <class Arch, bool MX>
struct Instances {
  using Add = Gemm<Arch, MX, kAddFloat, false>;
  using AddMany = Gemm<Arch, MX, kAddFloat, true>;
  using WriteMany = Gemm<Arch, MX, kWriteBFloat16, true>;

  static const char* scratch(GemmOutput output, const Product* products, int32_t number, int64_t* bytes) {
    if (output == kWriteBFloat16) return scratch_of<WriteMany, true>(products, number, bytes);
    return number == 1 ? scratch_of<Add, false>(products, 1, bytes)
                       : scratch_of<AddMany, true>(products, number, bytes);
  }

  static const char* run(GemmOutput output, const Product* products, int32_t number, void* memory,
                         cudaStream_t stream) {
    if (output == kWriteBFloat16) return multiply<WriteMany, true>(products, number, memory, stream);
    return number == 1 ? multiply<Add, false>(products, 1, memory, stream)
                       : multiply<AddMany, true>(products, number, memory, stream);
  }
};

}  // namespace fp4dist
