// Shared memory: cp.async, to it past the registers; and loads and stores by its own addresses.
#pragma once

#include "ops/cuda/common.cuh"

namespace dsfp4::ops::cuda {

/// Addresses in shared memory as the instructions have them, in 32 bits.
__device__ __forceinline__ unsigned shared_address(const void* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}
__device__ __forceinline__ uint4 load_shared16(unsigned at) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at));
  return v;
}
__device__ __forceinline__ float2 load_shared_floats(unsigned at) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at));
  return v;
}
template <int kBytes>
__device__ __forceinline__ unsigned load_shared_word(unsigned at) {
  static_assert(kBytes == 1 || kBytes == 2 || kBytes == 4);
  unsigned v;
  if constexpr (kBytes == 4) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
  } else if constexpr (kBytes == 2) {
    asm volatile("ld.shared.u16 %0, [%1];" : "=r"(v) : "r"(at));
  } else {
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(at));
  }
  return v;
}

__device__ __forceinline__ void store_shared16(unsigned at, const uint4& v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w));
}
template <int kBytes>
__device__ __forceinline__ void clear_shared(unsigned at) {
  static_assert(kBytes == 4 || kBytes == 8);
  if constexpr (kBytes == 8) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %1};" ::"r"(at), "r"(0));
  } else {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(0));
  }
}

template <int kBytes>
__device__ __forceinline__ void copy_async(unsigned to, const void* from) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes));
  }
}
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  copy_async<kBytes>(shared_address(to), from);
}
/// 16 bytes of a row that is read on later: the rest of its 128 come into the L2 cache with them.
__device__ __forceinline__ void copy_of_row(unsigned to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from));
}
__device__ __forceinline__ void copy_of_row(void* to, const void* from) {
  copy_of_row(shared_address(to), from);
}
/// The 128 bytes in which `from` lies to the L2 cache.
__device__ __forceinline__ void prefetch_line(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}
/// `bytes` from there on, without the last that are no whole 16; nothing before compute capability
/// 9.0, nor where `from` is not aligned to 16.
__device__ __forceinline__ void prefetch_bulk(const void* from, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (reinterpret_cast<std::uintptr_t>(from) % 16 != 0) return;
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes & ~15));
#endif
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
template <int kLeft>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft));
}

}  // namespace dsfp4::ops::cuda
