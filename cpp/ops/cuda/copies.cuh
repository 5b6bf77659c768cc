// cp.async: memory to shared memory past the registers.
#pragma once

#include "ops/cuda/common.cuh"

namespace dsfp4::ops::cuda {

template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from));
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(from), "n"(kBytes));
  }
}
/// 16 bytes of a row that is read on later: the rest of its 128 come into the L2 cache with them.
__device__ __forceinline__ void copy_of_row(void* to, const void* from) {
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(from));
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
template <int kLeft>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft));
}

/// 16 bytes, or zeros where `bytes` is 0.
__device__ __forceinline__ void copy_or_clear(void* to, const void* from, int bytes) {
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from),
               "r"(bytes));
}

}  // namespace dsfp4::ops::cuda
