// As much of CUDA as csrc/cuda needs, on the CPU: a thread for each CUDA thread, one block after another. For tests only.
#pragma once

#include <atomic>
#include <barrier>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1;
  dim3(unsigned x = 1) : x(x) {}
};
enum cudaError_t { cudaSuccess };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline thread_local dim3 threadIdx, blockIdx;

namespace emulation {
constexpr unsigned kWarp = 32;
inline std::unique_ptr<std::barrier<>> block_barrier;
inline std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
inline std::vector<double> registers;  // what a shuffle exchanges, one a thread
inline std::atomic<bool> vote;
}  // namespace emulation

inline void __syncthreads() { emulation::block_barrier->arrive_and_wait(); }

inline bool __syncthreads_and(bool predicate) {
  if (threadIdx.x == 0) emulation::vote = true;
  __syncthreads();
  if (!predicate) emulation::vote = false;
  __syncthreads();
  const bool result = emulation::vote;
  __syncthreads();
  return result;
}

inline double __shfl_xor_sync(unsigned, double value, unsigned mask) {
  auto& warp = *emulation::warp_barriers[threadIdx.x / emulation::kWarp];
  emulation::registers[threadIdx.x] = value;
  warp.arrive_and_wait();
  const double other = emulation::registers[threadIdx.x ^ mask];
  warp.arrive_and_wait();
  return other;
}

inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* address, unsigned value) { return std::atomic_ref(*address).fetch_add(value); }
template <class T>
T __ldcg(const T* address) {
  return *address;
}

inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A... arguments) {
  const unsigned threads = config->blockDim.x;
  emulation::registers.assign(threads, 0.0);
  for (unsigned block = 0; block < config->gridDim.x; ++block) {
    emulation::block_barrier = std::make_unique<std::barrier<>>(threads);
    emulation::warp_barriers.clear();
    for (unsigned w = 0; w < threads / emulation::kWarp; ++w) {
      emulation::warp_barriers.push_back(std::make_unique<std::barrier<>>(emulation::kWarp));
    }
    std::vector<std::thread> running;
    for (unsigned thread = 0; thread < threads; ++thread) {
      running.emplace_back([=] {
        threadIdx = dim3(thread);
        blockIdx = dim3(block);
        kernel(arguments...);
      });
    }
    for (std::thread& thread : running) thread.join();
  }
  return cudaSuccess;
}
