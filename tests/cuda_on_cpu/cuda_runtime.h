// As much of CUDA as complement_cuda.cu uses, for a C++ compiler and one CPU thread.
//
// Blocks run one after another. The threads of a block are fibers: each runs until its next barrier, and between two
// barriers they take turns in a random order, so that a missing barrier shows as another result. A launch fails where a
// device would refuse it. Shared memory is NaN when a block starts, and the block must leave what lies behind it alone.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) (static_cast<void>(address), static_cast<void>(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) (static_cast<void>(address), static_cast<void>(size))
#endif

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidConfiguration = 9;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace complora {
inline constexpr size_t SHARED_BYTES = 48 * 1024, GUARD_BYTES = 4096;
alignas(128) inline unsigned char block_memory[SHARED_BYTES + GUARD_BYTES];  // the `extern __shared__` array
}  // namespace complora

namespace cuda_on_cpu {

inline uint64_t seed = 0;
inline int64_t launches = 0;
inline cudaError_t next_error = cudaSuccess;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: %s in block (%u, %u, %u)\n", what, blockIdx.x, blockIdx.y, blockIdx.z);
  std::abort();
}

// Frame pointer, stack pointer and where to go on: sanitizers do not step between these, as they do for setjmp.
using Jump = void* [5];

__attribute__((noinline, no_sanitize_address)) inline void jump(Jump& to) { __builtin_longjmp(to, 1); }

__attribute__((noinline, no_sanitize_address)) inline void change(Jump& from, Jump& to) {
  if (__builtin_setjmp(from) == 0) {
    jump(to);
  }
}

struct Fiber {
  Jump state;
  bool started = false, finished = false;
  int barrier = 0;  // the line of the one it waits at
  ucontext_t entry;
  std::unique_ptr<char[]> stack;
};

inline Jump scheduler;
inline Fiber* current;
inline std::vector<Fiber> fibers;
inline std::function<void()> kernel;  // of one thread

inline void wait(int line) {
  current->barrier = line;
  change(current->state, scheduler);
}

inline void live() {  // once for each block
  while (true) {
    kernel();
    current->finished = true;
    change(current->state, scheduler);
  }
}

__attribute__((noinline, no_sanitize_address)) inline void resume(Fiber& fiber) {
  current = &fiber;
  if (fiber.started) {
    change(scheduler, fiber.state);
  } else if (__builtin_setjmp(scheduler) == 0) {
    constexpr size_t STACK = 512 * 1024;
    fiber.started = true;
    fiber.stack.reset(new char[STACK]);
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack.get();
    fiber.entry.uc_stack.ss_size = STACK;
    makecontext(&fiber.entry, live, 0);
    setcontext(&fiber.entry);
  }
}

inline void run_block(size_t threads, size_t shared_bytes, std::mt19937_64& random) {
  using complora::block_memory;
  std::memset(block_memory, 0xFF, sizeof(block_memory));
  ASAN_POISON_MEMORY_REGION(block_memory + shared_bytes, sizeof(block_memory) - shared_bytes);
  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; ++i) {
    order[i] = i;
    fibers[i].finished = false;
  }
  for (bool running = true; running;) {
    std::shuffle(order.begin(), order.end(), random);
    for (unsigned i : order) {
      threadIdx = dim3(i, 0, 0);
      resume(fibers[i]);
    }
    for (unsigned i : order) {
      if (fibers[i].finished != fibers[0].finished || (!fibers[i].finished && fibers[i].barrier != fibers[0].barrier)) {
        fail("the threads are not at the same barrier");
      }
    }
    running = !fibers[0].finished;
  }
  ASAN_UNPOISON_MEMORY_REGION(block_memory, sizeof(block_memory));
  if (std::any_of(block_memory + shared_bytes, std::end(block_memory), [](unsigned char c) { return c != 0xFF; })) {
    fail("a write behind shared memory");
  }
}

}  // namespace cuda_on_cpu

#define __syncthreads() cuda_on_cpu::wait(__LINE__)

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... values) {
  using namespace cuda_on_cpu;
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const dim3 grid = config->gridDim, block = config->blockDim;
  const std::tuple<std::remove_const_t<Parameters>...> arguments(std::forward<Arguments>(values)...);
  if (const cudaError_t error = std::exchange(next_error, cudaSuccess); error != cudaSuccess) {
    return error;
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535 ||
      block.x == 0 || block.x > 1024 || config->dynamicSmemBytes > complora::SHARED_BYTES ||
      sizeof(arguments) > 32764) {
    return cudaErrorInvalidConfiguration;
  }
  ++launches;
  fibers.resize(std::max<size_t>(fibers.size(), block.x));
  cuda_on_cpu::kernel = [&] { std::apply(kernel, arguments); };
  blockDim = block;
  gridDim = grid;
  std::mt19937_64 random(seed);
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t b = seed % 2 == 0 ? i : blocks - 1 - i;
    blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
    run_block(block.x, config->dynamicSmemBytes, random);
  }
  return cudaSuccess;
}
