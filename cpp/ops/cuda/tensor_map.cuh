// Copies of whole tiles by Hopper's copy engine: one thread asks for a tile, a barrier in shared
// memory counts the bytes that have come.
#pragma once

#include <cuda.h>

#include "ops/cuda/copies.cuh"

namespace dsfp4::ops::cuda {

/// A BF16 matrix [rows, cols], its rows `stride` values apart (a multiple of 8; `data` on 16
/// bytes), read in tiles of `box_rows` rows, at most 256, by 64 columns, each row's units mixed as
/// tile_descriptor<128>() expects. Beyond the matrix a tile has zeros.
bool map_tiles(CUtensorMap& map, const __nv_bfloat16* data, std::int64_t rows, std::int64_t cols,
               std::int64_t stride, int box_rows);

/// Barriers in shared memory, by their addresses there. Phase n ends when `count` have arrived and
/// the bytes expected have come.
__device__ __forceinline__ void barrier_begin(unsigned barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive_if(bool arrives, unsigned barrier) {
  asm volatile(
      "{.reg .pred arrives;\n"
      "setp.ne.b32 arrives, %1, 0;\n"
      "@arrives mbarrier.arrive.shared.b64 _, [%0];}\n" ::"r"(barrier),
      "r"(static_cast<int>(arrives))
      : "memory");
}
/// `parity` of the phase: 0, 1, 0, ... Of a new barrier, the phase before the first has ended.
__device__ __forceinline__ void barrier_wait(unsigned barrier, int parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again;}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}
/// Arrives, and `bytes` more are to come.
__device__ __forceinline__ void barrier_expect(unsigned barrier, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
#endif
}
/// Asks for the tile at (row, col).
__device__ __forceinline__ void copy_tile(unsigned to, const CUtensorMap& map, int row, int col,
                                          unsigned barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(reinterpret_cast<std::uint64_t>(&map)), "r"(col), "r"(row), "r"(barrier)
      : "memory");
#endif
}

}  // namespace dsfp4::ops::cuda
