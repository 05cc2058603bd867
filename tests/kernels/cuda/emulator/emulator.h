// CUDA's execution model on a CPU, as far as csrc/ uses it: every thread of a block is a coroutine that runs until it
// waits for others (a barrier, an exchange between lanes). Blocks run one after the other. A test compiles csrc/*.cu
// with this in place of nvcc's built-ins and gets the very arithmetic of the kernels, in their order. Memory that no
// thread should touch is not watched over: compute-sanitizer does that on a GPU.
#pragma once

#include <cuda_runtime_api.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // one block at a time
#define FP4DIST_DYNAMIC_SHARED(name) unsigned char* name = emulator::dynamic_shared
#define FP4DIST_LAUNCH(kernel, blocks, threads, shared, stream, ...) \
  emulator::launch((blocks), (threads), (shared), [=] { kernel(__VA_ARGS__); })

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr size_t kStack = 256 * 1024;

struct Thread {
  ucontext_t start;
  jmp_buf place;
  bool begun = false, done = false;
  std::vector<char> stack = std::vector<char>(kStack);
};

struct Gathering {  // of those that wait for each other
  unsigned arrived = 0, generation = 0;
};

inline std::vector<Thread> threads;
inline std::vector<Gathering> warps;
inline Gathering block;
inline std::vector<uint64_t> slots;  // what lanes show each other
inline ucontext_t caller;
inline unsigned live;
inline unsigned char* dynamic_shared;
inline std::function<void()> body;

inline void run(unsigned next) {
  threadIdx.x = next;
  Thread& thread = threads[next];
  if (thread.begun) _longjmp(thread.place, 1);
  thread.begun = true;
  setcontext(&thread.start);
}

inline unsigned following(unsigned i) {
  do {
    i = (i + 1) % threads.size();
  } while (threads[i].done);
  return i;
}

inline void yield() {
  const unsigned self = threadIdx.x;
  if (_setjmp(threads[self].place) == 0) run(following(self));
}

inline void entry() {
  body();
  threads[threadIdx.x].done = true;
  if (--live == 0) setcontext(&caller);
  run(following(threadIdx.x));
}

inline void gather(Gathering& group, unsigned size) {
  const unsigned generation = group.generation;
  if (++group.arrived == size) {
    group.arrived = 0;
    ++group.generation;
    return;
  }
  while (group.generation == generation) yield();
}

inline void gather_warp() { gather(warps[threadIdx.x / 32], 32); }

// What each lane of the warp shows, given to `use` of all 32 in turn.
template <class T, class Use>
void exchange(T value, Use use) {
  const unsigned first = threadIdx.x / 32 * 32;
  std::memcpy(&slots[threadIdx.x], &value, sizeof value);
  gather_warp();
  for (unsigned lane = 0; lane < 32; ++lane) {
    T shown;
    std::memcpy(&shown, &slots[first + lane], sizeof shown);
    use(lane, shown);
  }
  gather_warp();
}

inline void launch(unsigned blocks, unsigned size, size_t shared, std::function<void()> kernel) {
  std::vector<unsigned char> memory(shared + 16);
  dynamic_shared = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16;
  body = std::move(kernel);
  threads.resize(size);
  warps.assign(size / 32, {});
  slots.resize(size);
  gridDim.x = blocks;
  blockDim.x = size;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    block = {};
    live = size;
    for (Thread& thread : threads) {
      thread.begun = thread.done = false;
      getcontext(&thread.start);
      thread.start.uc_stack.ss_sp = thread.stack.data();
      thread.start.uc_stack.ss_size = kStack;
      makecontext(&thread.start, entry, 0);
    }
    volatile bool finished = false;
    getcontext(&caller);
    if (!finished) {
      finished = true;
      run(0);
    }
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::gather(emulator::block, blockDim.x); }

template <class T>
T __shfl_xor_sync(uint32_t, T value, int mask) {
  T found{};
  const unsigned wanted = threadIdx.x % 32 ^ static_cast<unsigned>(mask);
  emulator::exchange(value, [&](unsigned lane, T shown) {
    if (lane == wanted) found = shown;
  });
  return found;
}

template <class T>
T __shfl_sync(uint32_t, T value, int from) {
  T found{};
  emulator::exchange(value, [&](unsigned lane, T shown) {
    if (lane == static_cast<unsigned>(from)) found = shown;
  });
  return found;
}

inline void __syncwarp() { emulator::gather_warp(); }

inline int __all_sync(uint32_t, int value) {
  int found = 1;
  emulator::exchange(value, [&](unsigned, int shown) { found = found && shown; });
  return found;
}

inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
  uint32_t found = 0;
  emulator::exchange(value, [&](unsigned, uint32_t shown) { found = std::max(found, shown); });
  return found;
}

inline uint32_t __reduce_add_sync(uint32_t, uint32_t value) {
  uint32_t found = 0;
  emulator::exchange(value, [&](unsigned, uint32_t shown) { found += shown; });
  return found;
}

inline uint32_t atomicMax(uint32_t* to, uint32_t value) { return std::exchange(*to, std::max(*to, value)); }
inline uint32_t atomicMin(uint32_t* to, uint32_t value) { return std::exchange(*to, std::min(*to, value)); }
inline uint32_t atomicAdd(uint32_t* to, uint32_t value) { return std::exchange(*to, *to + value); }
inline uint32_t atomicExch(uint32_t* to, uint32_t value) { return std::exchange(*to, value); }
inline void __threadfence() {}
template <class T>
T __ldg(const T* from) {
  return *from;
}
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline uint32_t __float_as_uint(float x) {
  uint32_t b;
  std::memcpy(&b, &x, 4);
  return b;
}
inline float __uint_as_float(uint32_t b) {
  float x;
  std::memcpy(&x, &b, 4);
  return x;
}
inline uint32_t __vmaxu2(uint32_t a, uint32_t b) {
  return std::max(a & 0xffffu, b & 0xffffu) | std::max(a & 0xffff0000u, b & 0xffff0000u);
}
using std::max;

namespace fp4dist {

inline void copy_async16(void* shared, const void* global, bool inside) {
  if (inside) {
    std::memcpy(shared, global, 16);
  } else {
    std::memset(shared, 0, 16);
  }
}

inline void wait_for_copies() {}

inline void fetch_ahead(const void*) {}

inline float max_magnitude(float a, float b) {
  if (a != a || b != b) return __uint_as_float(0x7fffffffu);
  return std::max(std::fabs(a), std::fabs(b));
}

inline float at_most(float a, float limit) { return a != a ? __uint_as_float(0x7fffffffu) : std::min(a, limit); }

}  // namespace fp4dist
