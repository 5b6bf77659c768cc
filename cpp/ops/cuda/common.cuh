// What every file of the plugin shares: the device's state, and how failures are noted.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "ops/cuda/abi.h"

namespace dsfp4::ops::cuda {

constexpr int kMarks = 2;

struct Device {
  int index = 0;
  int major = 0;       // of the compute capability
  bool wgmma = false;  // whether kernels that use it may run
  int multiprocessors = 0;
  int shared_bytes = 0;           // that a block may have
  CUcontext context = nullptr;    // the device's primary one
  cudaStream_t stream = nullptr;  // of Queue::kCompute
  cudaStream_t uploads = nullptr;
  cudaStream_t downloads = nullptr;
  std::byte* ring = nullptr;              // the host's, two halves: small uploads pass through it
  const std::byte* ring_there = nullptr;  // as kernels reach it; null: they cannot
  std::size_t ring_at = 0;
  cudaEvent_t ring_left[2] = {};  // recorded as a half has been handed out
  cudaEvent_t marks[kMarks] = {};
  cudaStream_t clock_stream = nullptr;  // of set_clock(), like the next; null before its first call
  cudaEvent_t clock = nullptr;
};

constexpr std::size_t kRingHalf = kMostTaskBytes;

/// Up to `bytes` of the ring, at least one, and all of them if `whole` (at most kRingHalf), for a
/// copy that is queued before the next call; null if that failed. Waits only where copies of half a
/// ring ago have not run. At a multiple of 256 bytes.
std::byte* ring_space(Device*, std::size_t& bytes, bool whole);

/// Notes a failure; always false.
bool fail(cudaError_t code, const char* call, const char* source, int line);

#define DSFP4_TRY(call)                                                       \
  do {                                                                        \
    const cudaError_t dsfp4_code = (call);                                    \
    if (dsfp4_code != cudaSuccess)                                            \
      return ::dsfp4::ops::cuda::fail(dsfp4_code, #call, __FILE__, __LINE__); \
  } while (false)

/// Whether the launch before was accepted.
#define DSFP4_LAUNCHED(kernel)                                                 \
  do {                                                                         \
    const cudaError_t dsfp4_code = cudaGetLastError();                         \
    if (dsfp4_code != cudaSuccess)                                             \
      return ::dsfp4::ops::cuda::fail(dsfp4_code, kernel, __FILE__, __LINE__); \
  } while (false)

/// Launches a kernel that may begin while the one before it still runs, where the GPU can do that
/// (from compute capability 9.0 on). Such a kernel calls wait_for_inputs() first of all, or after
/// reading what no kernel writes (nor a copy, once it was read: see abi.h), and then
/// let_next_begin(). So what a kernel reads before it waits may come from the last kernel but one,
/// if it is read past the first-level cache (__ldcg, cp.async.cg), where only the wait makes it
/// visible. Clusters of `cluster` blocks along x, from 9.0 on.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_clusters(Device* device, void (*kernel)(Parameters...), dim3 grid,
                            unsigned threads, std::size_t shared, int cluster,
                            Arguments... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = device->stream;
  config.attrs = attributes;
  config.numAttrs = device->major < 9 ? 0 : cluster == 1 ? 1 : 2;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(Device* device, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                   std::size_t shared, Arguments... arguments) {
  return launch_clusters(device, kernel, grid, threads, shared, 1, arguments...);
}

__device__ __forceinline__ void wait_for_inputs() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
/// Both, for a kernel that reads nothing before.
__device__ __forceinline__ void begin_kernel() {
  wait_for_inputs();
  let_next_begin();
}

inline unsigned blocks_for(std::int64_t count, std::int64_t per_block) {
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

/// 2^x to 2^-22, 0 where it would be subnormal.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, step));
  }
  return value;
}

__device__ __forceinline__ float round_bf16(float value) {
  return __bfloat162float(__float2bfloat16_rn(value));
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

}  // namespace dsfp4::ops::cuda
