// Hopper's warpgroup products (wgmma): the left side from registers or shared memory, the right one
// from shared memory.
#pragma once

#include "ops/cuda/copies.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DSFP4_ON_HOPPER 1
#else
#define DSFP4_ON_HOPPER 0
#endif

namespace dsfp4::ops::cuda {

/// A tile of token rows of `kRowBytes` bytes, 64 or 128, whose 16-byte units are moved as the
/// hardware's swizzle of that width expects: see swizzled(). The tile begins on 1 KB.
template <int kRowBytes>
__device__ __forceinline__ std::uint64_t tile_descriptor(unsigned tile) {
  static_assert(kRowBytes == 64 || kRowBytes == 128);
  constexpr std::uint64_t kMode = kRowBytes == 128 ? 1 : 2;
  constexpr std::uint64_t kEightRows = kRowBytes * 8 / 16;
  return (tile & 0x3ffff) >> 4 | std::uint64_t{1} << 16 | kEightRows << 32 | kMode << 62;
}
template <int kRowBytes>
__device__ __forceinline__ std::uint64_t tile_descriptor(const void* tile) {
  return tile_descriptor<kRowBytes>(shared_address(tile));
}

/// The same slices of 64 columns, taken by columns: the rows are what is summed over, 16 of them,
/// and slices of 64 columns lie `slice_bytes` apart.
__device__ __forceinline__ std::uint64_t columns_descriptor(unsigned rows, int slice_bytes) {
  return (rows & 0x3ffff) >> 4 | static_cast<std::uint64_t>(slice_bytes / 16) << 16 |
         std::uint64_t{1024 / 16} << 32 | std::uint64_t{1} << 62;
}
__device__ __forceinline__ std::uint64_t columns_descriptor(const void* rows, int slice_bytes) {
  return columns_descriptor(shared_address(rows), slice_bytes);
}

/// A descriptor of what lies `bytes` further.
__device__ __forceinline__ std::uint64_t further(std::uint64_t descriptor, int bytes) {
  return descriptor + static_cast<std::uint64_t>(bytes / 16);
}

// What was written to shared memory by this thread is seen by the products after the next barrier.
__device__ __forceinline__ void publish_to_products() {
#if DSFP4_ON_HOPPER
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// Before a product that reads registers which were written by other instructions.
__device__ __forceinline__ void order_registers() {
#if DSFP4_ON_HOPPER
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void commit_products() {
#if DSFP4_ON_HOPPER
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int kLeft>
__device__ __forceinline__ void wait_products() {
#if DSFP4_ON_HOPPER
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
#endif
}

/// How many registers a thread has from here on; by all of a warpgroup.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
#if DSFP4_ON_HOPPER
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
#if DSFP4_ON_HOPPER
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// clang-format off
#define DSFP4_SUMS8(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), \
    "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define DSFP4_SUMS64(c) DSFP4_SUMS8(c, 0), DSFP4_SUMS8(c, 8), DSFP4_SUMS8(c, 16), \
    DSFP4_SUMS8(c, 24), DSFP4_SUMS8(c, 32), DSFP4_SUMS8(c, 40), DSFP4_SUMS8(c, 48), \
    DSFP4_SUMS8(c, 56)
#define DSFP4_NAMES16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define DSFP4_NAMES32 DSFP4_NAMES16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define DSFP4_NAMES64 DSFP4_NAMES32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
    ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
// clang-format on

/// sums += weights x tokens: 64 weight rows, kTokens tokens, 16 columns. A warp holds 16 of the
/// rows in the layout of mma.m16n8k16, tile n of 8 tokens in sums[4n, 4n + 4).
template <int kTokens>
__device__ __forceinline__ void multiply_tokens(float (&c)[kTokens / 2], const unsigned (&a)[4],
                                                std::uint64_t tokens) {
#if DSFP4_ON_HOPPER
  static_assert(kTokens == 16 || kTokens == 32 || kTokens == 64 || kTokens == 128 ||
                kTokens == 144);
  if constexpr (kTokens == 16) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %13, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, p, 1, 1, 0;}\n"
        : DSFP4_SUMS8(c, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tokens), "r"(1));
  } else if constexpr (kTokens == 32) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %21, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{" DSFP4_NAMES16 "}, {%16,%17,%18,%19}, %20, p, 1, 1, 0;}\n"
        : DSFP4_SUMS8(c, 0), DSFP4_SUMS8(c, 8)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tokens), "r"(1));
  } else if constexpr (kTokens == 64) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{" DSFP4_NAMES32 "}, {%32,%33,%34,%35}, %36, p, 1, 1, 0;}\n"
        : DSFP4_SUMS8(c, 0), DSFP4_SUMS8(c, 8), DSFP4_SUMS8(c, 16), DSFP4_SUMS8(c, 24)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tokens), "r"(1));
  } else if constexpr (kTokens == 128) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{" DSFP4_NAMES64 "}, {%64,%65,%66,%67}, %68, p, 1, 1, 0;}\n"
        : DSFP4_SUMS64(c)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tokens), "r"(1));
  } else {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %77, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n144k16.f32.bf16.bf16 "
        "{" DSFP4_NAMES64
        ",%64,%65,%66,%67,%68,%69,%70,%71}, {%72,%73,%74,%75}, %76, p, 1, 1, 0;}\n"
        : DSFP4_SUMS64(c), DSFP4_SUMS8(c, 64)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tokens), "r"(1));
  }
#endif
}

/// c = or += a b, 64 rows, 64 columns, 16 summed over; both from shared memory, by rows.
__device__ __forceinline__ void multiply_rows(float (&c)[32], std::uint64_t a, std::uint64_t b,
                                              bool add) {
#if DSFP4_ON_HOPPER
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{" DSFP4_NAMES32 "}, %32, %33, p, 1, 1, 0, 0;}\n"
      : DSFP4_SUMS8(c, 0), DSFP4_SUMS8(c, 8), DSFP4_SUMS8(c, 16), DSFP4_SUMS8(c, 24)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
#endif
}

/// The same with 128 columns.
__device__ __forceinline__ void multiply_rows(float (&c)[64], std::uint64_t a, std::uint64_t b,
                                              bool add) {
#if DSFP4_ON_HOPPER
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{" DSFP4_NAMES64 "}, %64, %65, p, 1, 1, 0, 0;}\n"
      : DSFP4_SUMS64(c)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
#endif
}

/// c += a b, 64 rows, 128 columns; `a` in registers, as multiply_tokens() has the weight, and `b` a
/// columns_descriptor().
__device__ __forceinline__ void multiply_columns(float (&c)[64], const unsigned (&a)[4],
                                                 std::uint64_t b) {
#if DSFP4_ON_HOPPER
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{" DSFP4_NAMES64 "}, {%64,%65,%66,%67}, %68, p, 1, 1, 1;}\n"
      : DSFP4_SUMS64(c)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
#endif
}

/// c += a b, 64 rows, 256 columns; `b` is a columns_descriptor().
__device__ __forceinline__ void multiply_columns(float (&c)[128], std::uint64_t a,
                                                 std::uint64_t b) {
#if DSFP4_ON_HOPPER
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
      "{" DSFP4_NAMES64
      ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
      "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
      "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"
      "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, "
      "%128, %129, p, 1, 1, 0, 1;}\n"
      : DSFP4_SUMS8(c, 0), DSFP4_SUMS8(c, 8), DSFP4_SUMS8(c, 16), DSFP4_SUMS8(c, 24),
        DSFP4_SUMS8(c, 32), DSFP4_SUMS8(c, 40), DSFP4_SUMS8(c, 48), DSFP4_SUMS8(c, 56),
        DSFP4_SUMS8(c, 64), DSFP4_SUMS8(c, 72), DSFP4_SUMS8(c, 80), DSFP4_SUMS8(c, 88),
        DSFP4_SUMS8(c, 96), DSFP4_SUMS8(c, 104), DSFP4_SUMS8(c, 112), DSFP4_SUMS8(c, 120)
      : "l"(a), "l"(b), "r"(1));
#endif
}

}  // namespace dsfp4::ops::cuda
