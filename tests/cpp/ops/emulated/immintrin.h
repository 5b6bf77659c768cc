// The AVX-512 intrinsics that the kernels use, in plain C++, so that their files run on a CPU with
// AVX2: this folder stands before the compiler's own on the include path. Written from Intel's
// description of each instruction. Types and all below AVX-512 come from the compiler's header.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include_next <immintrin.h>

namespace emulated {

template <class To, class From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T, int count>
struct Lanes {
  T v[count];
};
using F32 = Lanes<float, 16>;
using I32 = Lanes<std::int32_t, 16>;
using U16 = Lanes<std::uint16_t, 32>;
using U8 = Lanes<std::uint8_t, 64>;
using U64 = Lanes<std::uint64_t, 8>;

template <class L>
inline L lanes(const void* from) {
  L l;
  std::memcpy(&l, from, sizeof(l));
  return l;
}

// Each lane of the result from the lane's number.
template <class Vector, class L, class F>
inline Vector make(const F& lane) {
  L l;
  int i = 0;
  for (auto& v : l.v) v = lane(i++);
  return bits_as<Vector>(l);
}

inline __m512i loadu_si512(const void* p) { return lanes<__m512i>(p); }
inline __m512 loadu_ps(const void* p) { return lanes<__m512>(p); }
inline void storeu(void* p, __m512i a) { std::memcpy(p, &a, sizeof(a)); }
inline void storeu_ps(void* p, __m512 a) { std::memcpy(p, &a, sizeof(a)); }
inline __m512i setzero_si512() { return __m512i{}; }
inline __m512 setzero_ps() { return __m512{}; }
inline __m512 set1_ps(float x) {
  return make<__m512, F32>([=](int) { return x; });
}
inline __m512i set1_epi32(int x) {
  return make<__m512i, I32>([=](int) { return x; });
}
inline __m512i set1_epi16(short x) {
  return make<__m512i, U16>([=](int) { return static_cast<std::uint16_t>(x); });
}
inline __m512i set1_epi8(char x) {
  return make<__m512i, U8>([=](int) { return static_cast<std::uint8_t>(x); });
}
template <class... T>
inline __m512 setr_ps(T... x) {
  return bits_as<__m512>(F32{{static_cast<float>(x)...}});
}
template <class... T>
inline __m512i setr_epi32(T... x) {
  return bits_as<__m512i>(I32{{static_cast<std::int32_t>(x)...}});
}
inline __m512i set_epi64(long long h, long long g, long long f, long long e, long long d,
                         long long c, long long b, long long a) {
  return __m512i{a, b, c, d, e, f, g, h};
}
inline __m512 castsi512_ps(__m512i a) { return bits_as<__m512>(a); }
// The upper parts are undefined: make them bad.
inline __m512i castsi256_si512(__m256i a) {
  __m512i r = set1_epi16(0x7fc1);
  std::memcpy(&r, &a, sizeof(a));
  return r;
}
inline __m256 castps512_ps256(__m512 a) { return lanes<__m256>(&a); }
inline __m256 extractf32x8_ps(__m512 a, int half) {
  return lanes<__m256>(reinterpret_cast<const char*>(&a) + 32 * half);
}
inline __m512i inserti64x4(__m512i a, __m256i b, int half) {
  std::memcpy(reinterpret_cast<char*>(&a) + 32 * half, &b, sizeof(b));
  return a;
}
inline __m512i broadcast_i32x4(__m128i a) {
  __m512i r;
  for (int i = 0; i < 4; ++i) std::memcpy(reinterpret_cast<char*>(&r) + 16 * i, &a, sizeof(a));
  return r;
}
inline __m512i broadcast_i64x4(__m256i a) { return inserti64x4(castsi256_si512(a), a, 1); }

template <class From, class L>
inline __m512i widen(const void* from) {
  constexpr int kCount = sizeof(L) / sizeof(L{}.v[0]);
  From narrow[kCount];
  std::memcpy(narrow, from, sizeof(narrow));
  return make<__m512i, L>([&](int i) { return narrow[i]; });
}
inline __m512i cvtepu8_epi16(__m256i a) { return widen<std::uint8_t, U16>(&a); }
inline __m512i cvtepi8_epi16(__m256i a) { return widen<std::int8_t, U16>(&a); }
inline __m512i cvtepu16_epi32(__m256i a) { return widen<std::uint16_t, I32>(&a); }
inline __m512i cvtepi8_epi32(__m128i a) { return widen<std::int8_t, I32>(&a); }
inline __m512i cvtepu8_epi32(__m128i a) { return widen<std::uint8_t, I32>(&a); }

inline __m512i and_si512(__m512i a, __m512i b) { return a & b; }
// Bit by bit: the bit of `table` that the three bits a b c number.
inline __m512i ternarylogic(__m512i a, __m512i b, __m512i c, int table) {
  __m512i r{};
  for (int index = 0; index < 8; ++index) {
    if ((table >> index & 1) == 0) continue;
    r |= ((index & 4) != 0 ? a : ~a) & ((index & 2) != 0 ? b : ~b) & ((index & 1) != 0 ? c : ~c);
  }
  return r;
}
inline __m512i add_epi32(__m512i a, __m512i b) {
  const auto x = bits_as<I32>(a);
  const auto y = bits_as<I32>(b);
  return make<__m512i, I32>([&](int i) { return x.v[i] + y.v[i]; });
}
inline __m512i add_epi16(__m512i a, __m512i b) {
  const auto x = bits_as<U16>(a);
  const auto y = bits_as<U16>(b);
  return make<__m512i, U16>([&](int i) { return static_cast<std::uint16_t>(x.v[i] + y.v[i]); });
}
inline __m512i slli_epi32(__m512i a, unsigned n) {
  const auto x = bits_as<I32>(a);
  return make<__m512i, I32>(
      [&](int i) { return static_cast<std::int32_t>(static_cast<std::uint32_t>(x.v[i]) << n); });
}
inline __m512i slli_epi16(__m512i a, unsigned n) {
  const auto x = bits_as<U16>(a);
  return make<__m512i, U16>([&](int i) { return static_cast<std::uint16_t>(x.v[i] << n); });
}
inline __m512i srli_epi16(__m512i a, unsigned n) {
  const auto x = bits_as<U16>(a);
  return make<__m512i, U16>([&](int i) { return static_cast<std::uint16_t>(x.v[i] >> n); });
}
inline __m512i srli_epi32(__m512i a, unsigned n) {
  const auto x = bits_as<I32>(a);
  return make<__m512i, I32>(
      [&](int i) { return static_cast<std::int32_t>(static_cast<std::uint32_t>(x.v[i]) >> n); });
}
inline __m512i srai_epi32(__m512i a, unsigned n) {
  const auto x = bits_as<I32>(a);
  return make<__m512i, I32>([&](int i) { return x.v[i] >> n; });
}
inline __m512i max_epi32(__m512i a, __m512i b) {
  const auto x = bits_as<I32>(a);
  const auto y = bits_as<I32>(b);
  return make<__m512i, I32>([&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; });
}
inline std::int32_t reduce_add_epi32(__m512i a) {
  std::int32_t sum = 0;
  for (const std::int32_t v : bits_as<I32>(a).v) sum += v;
  return sum;
}
inline std::int32_t reduce_max_epi32(__m512i a) {
  const auto x = bits_as<I32>(a);
  std::int32_t most = x.v[0];
  for (const std::int32_t v : x.v) most = v > most ? v : most;
  return most;
}
// To the nearest, ties to even.
inline __m512i cvtps_epi32(__m512 a) {
  const auto x = bits_as<F32>(a);
  return make<__m512i, I32>(
      [&](int i) { return static_cast<std::int32_t>(std::nearbyint(x.v[i])); });
}
inline __m512 cvtepi32_ps(__m512i a) {
  const auto x = bits_as<I32>(a);
  return make<__m512, F32>([&](int i) { return static_cast<float>(x.v[i]); });
}
// The lowest byte of each.
inline __m128i cvtepi32_epi8(__m512i a) {
  const auto x = bits_as<I32>(a);
  return make<__m128i, Lanes<std::uint8_t, 16>>(
      [&](int i) { return static_cast<std::uint8_t>(x.v[i]); });
}
// Four products of an unsigned byte of `a` with a signed one of `b` added to each sum.
inline __m512i dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  const auto s = bits_as<I32>(sum);
  const auto x = bits_as<U8>(a);
  const auto y = bits_as<Lanes<std::int8_t, 64>>(b);
  return make<__m512i, I32>([&](int i) {
    std::int32_t total = s.v[i];
    for (int k = 4 * i; k < 4 * i + 4; ++k) total += x.v[k] * y.v[k];
    return total;
  });
}
inline __m512i srlv_epi16(__m512i a, __m512i n) {
  const auto x = bits_as<U16>(a);
  const auto by = bits_as<U16>(n);
  return make<__m512i, U16>(
      [&](int i) { return static_cast<std::uint16_t>(by.v[i] < 16 ? x.v[i] >> by.v[i] : 0); });
}
inline __m512 mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const auto x = bits_as<F32>(a);
  const auto y = bits_as<F32>(b);
  const auto z = bits_as<F32>(c);
  return make<__m512, F32>([&](int i) { return std::fma(x.v[i], y.v[i], z.v[i]); });
}

template <class L, class F>
inline std::uint32_t mask_of(__m512i a, __m512i b, const F& holds) {
  const auto x = bits_as<L>(a);
  const auto y = bits_as<L>(b);
  std::uint32_t mask = 0;
  int i = 0;
  for (const auto v : x.v) {
    if (holds(v, y.v[i])) mask |= 1u << i;
    ++i;
  }
  return mask;
}
inline __mmask64 cmpeq_epi8_mask(__m512i a, __m512i b) {
  const auto x = bits_as<U8>(a);
  const auto y = bits_as<U8>(b);
  __mmask64 mask = 0;
  for (int i = 0; i < 64; ++i) mask |= static_cast<__mmask64>(x.v[i] == y.v[i]) << i;
  return mask;
}
// Bytes whose bit is clear are not read.
inline __m512i maskz_loadu_epi8(__mmask64 mask, const void* from) {
  const auto* bytes = static_cast<const std::uint8_t*>(from);
  return make<__m512i, U8>(
      [&](int i) { return static_cast<std::uint8_t>((mask >> i & 1) != 0 ? bytes[i] : 0); });
}
// Within each 16 bytes.
inline __m512i shuffle_epi8(__m512i a, __m512i index) {
  const auto x = bits_as<U8>(a);
  const auto at = bits_as<U8>(index);
  return make<__m512i, U8>([&](int i) {
    return static_cast<std::uint8_t>(at.v[i] >= 128 ? 0 : x.v[i / 16 * 16 + at.v[i] % 16]);
  });
}
// Lane i of each 128 bits from the lane that bits 2i and 2i + 1 name, where the mask says so.
inline __m512i mask_shuffle_epi32(__m512i from, __mmask16 mask, __m512i a, int order) {
  const auto x = bits_as<I32>(a);
  const auto y = bits_as<I32>(from);
  return make<__m512i, I32>([&](int i) {
    return (mask >> i & 1) != 0 ? x.v[i / 4 * 4 + (order >> (i % 4 * 2) & 3)] : y.v[i];
  });
}
inline __m512i unpack_epi32(__m512i a, __m512i b, int first) {
  const auto x = bits_as<I32>(a);
  const auto y = bits_as<I32>(b);
  return make<__m512i, I32>([&](int i) {
    const int at = i / 4 * 4 + first + i % 4 / 2;
    return i % 2 == 0 ? x.v[at] : y.v[at];
  });
}
inline __m512i unpacklo_epi32(__m512i a, __m512i b) { return unpack_epi32(a, b, 0); }
inline __m512i unpackhi_epi32(__m512i a, __m512i b) { return unpack_epi32(a, b, 2); }
inline __m512i permutexvar_epi8(__m512i index, __m512i a) {
  const auto at = bits_as<U8>(index);
  const auto x = bits_as<U8>(a);
  return make<__m512i, U8>([&](int i) { return x.v[at.v[i] & 63]; });
}
inline __mmask16 cmpeq_epi32_mask(__m512i a, __m512i b) {
  return static_cast<__mmask16>(mask_of<I32>(a, b, [](auto x, auto y) { return x == y; }));
}
inline __mmask32 cmpgt_epu16_mask(__m512i a, __m512i b) {
  return mask_of<U16>(a, b, [](auto x, auto y) { return x > y; });
}
inline __m512 mask_mov_ps(__m512 a, __mmask16 mask, __m512 b) {
  const auto x = bits_as<F32>(a);
  const auto y = bits_as<F32>(b);
  return make<__m512, F32>([&](int i) { return (mask >> i & 1) != 0 ? y.v[i] : x.v[i]; });
}
inline __m512i mask_mov_epi16(__m512i a, __mmask32 mask, __m512i b) {
  const auto x = bits_as<U16>(a);
  const auto y = bits_as<U16>(b);
  return make<__m512i, U16>([&](int i) { return (mask >> i & 1) != 0 ? y.v[i] : x.v[i]; });
}
inline __m512 permutexvar_ps(__m512i index, __m512 a) {
  const auto at = bits_as<I32>(index);
  const auto x = bits_as<F32>(a);
  return make<__m512, F32>([&](int i) { return x.v[at.v[i] & 15]; });
}
inline __m512 permutex2var_ps(__m512 a, __m512i index, __m512 b) {
  const auto at = bits_as<I32>(index);
  const auto x = bits_as<F32>(a);
  const auto y = bits_as<F32>(b);
  return make<__m512, F32>(
      [&](int i) { return (at.v[i] & 16) != 0 ? y.v[at.v[i] & 15] : x.v[at.v[i] & 15]; });
}
inline __m512i permutexvar_epi16(__m512i index, __m512i a) {
  const auto at = bits_as<U16>(index);
  const auto x = bits_as<U16>(a);
  return make<__m512i, U16>([&](int i) { return x.v[at.v[i] & 31]; });
}
inline __m512i mask_permutexvar_epi16(__m512i from, __mmask32 mask, __m512i index, __m512i a) {
  return mask_mov_epi16(from, mask, permutexvar_epi16(index, a));
}

// ---- BF16: denormal inputs and results count as zeros, rounding is to nearest even --------------

inline float no_denormal(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? x * 0.0f : x; }
inline std::uint16_t bf16_bits(float x) {
  const auto bits = bits_as<std::uint32_t>(no_denormal(x));
  if (std::isnan(x)) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float bf16_value(std::uint16_t code) {
  return no_denormal(bits_as<float>(static_cast<std::uint32_t>(code) << 16));
}
struct Bf16x32 {
  std::uint16_t v[32];
};
inline Bf16x32 cvtne2ps_pbh(__m512 upper, __m512 lower) {
  const auto x = bits_as<F32>(lower);
  const auto y = bits_as<F32>(upper);
  Bf16x32 r;
  for (int i = 0; i < 16; ++i) {
    r.v[i] = bf16_bits(x.v[i]);
    r.v[16 + i] = bf16_bits(y.v[i]);
  }
  return r;
}
inline __m512 dpbf16_ps(__m512 sum, const Bf16x32& a, const Bf16x32& b) {
  const auto s = bits_as<F32>(sum);
  return make<__m512, F32>([&](int i) {
    const float odd = no_denormal(
        std::fma(bf16_value(a.v[2 * i + 1]), bf16_value(b.v[2 * i + 1]), no_denormal(s.v[i])));
    return no_denormal(std::fma(bf16_value(a.v[2 * i]), bf16_value(b.v[2 * i]), odd));
  });
}

// ---- AMX: eight tiles a thread, all of them 16 rows of 64 bytes once configured
// ------------------

struct Tile {
  unsigned char row[16][64];
};
struct TileState {
  bool configured = false;
  Tile tile[8];
};
inline TileState& tile_state() {
  thread_local TileState state;
  return state;
}
inline void tile_loadconfig(const void* config) {
  const auto* bytes = static_cast<const unsigned char*>(config);
  if (bytes[0] != 1) __builtin_trap();
  for (int t = 0; t < 8; ++t) {
    if (bytes[16 + 2 * t] != 64 || bytes[17 + 2 * t] != 0 || bytes[48 + t] != 16) __builtin_trap();
  }
  tile_state().configured = true;
}
inline void tile_release() { tile_state().configured = false; }
inline Tile& tile(int t) {
  if (!tile_state().configured) __builtin_trap();
  return tile_state().tile[t];
}
inline void tile_zero(int t) { std::memset(&tile(t), 0, sizeof(Tile)); }
inline void tile_loadd(int t, const void* from, long stride) {
  for (int r = 0; r < 16; ++r) {
    std::memcpy(tile(t).row[r], static_cast<const char*>(from) + r * stride, 64);
  }
}
inline void tile_stored(int t, void* to, long stride) {
  for (int r = 0; r < 16; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, tile(t).row[r], 64);
  }
}
inline void tile_dpbf16ps(int c, int a, int b) {
  for (int m = 0; m < 16; ++m) {
    auto sums = lanes<F32>(tile(c).row[m]);
    const auto left = lanes<Bf16x32>(tile(a).row[m]);
    for (int k = 0; k < 16; ++k) {
      const auto right = lanes<Bf16x32>(tile(b).row[k]);
      for (int n = 0; n < 16; ++n) {
        float& sum = sums.v[n];
        sum = no_denormal(std::fma(bf16_value(left.v[2 * k]), bf16_value(right.v[2 * n]), sum));
        sum = no_denormal(
            std::fma(bf16_value(left.v[2 * k + 1]), bf16_value(right.v[2 * n + 1]), sum));
      }
    }
    std::memcpy(tile(c).row[m], &sums, sizeof(sums));
  }
}

}  // namespace emulated

#undef _tile_dpbf16ps
#define _tile_dpbf16ps emulated::tile_dpbf16ps
#undef _tile_loadd
#define _tile_loadd emulated::tile_loadd
#undef _tile_stored
#define _tile_stored emulated::tile_stored
#undef _tile_zero
#define _tile_zero emulated::tile_zero
#define _tile_loadconfig emulated::tile_loadconfig
#define _tile_release emulated::tile_release
#define __m512bh emulated::Bf16x32
#define _mm512_add_epi16 emulated::add_epi16
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_and_si512 emulated::and_si512
#define _mm512_broadcast_i32x4 emulated::broadcast_i32x4
#define _mm512_broadcast_i64x4 emulated::broadcast_i64x4
#define _mm512_castps512_ps256 emulated::castps512_ps256
#define _mm512_castsi256_si512 emulated::castsi256_si512
#define _mm512_castsi512_ps emulated::castsi512_ps
#define _mm512_cmpeq_epi32_mask emulated::cmpeq_epi32_mask
#define _mm512_cmpeq_epi8_mask emulated::cmpeq_epi8_mask
#define _mm512_cmpgt_epu16_mask emulated::cmpgt_epu16_mask
#define _mm512_cvtepi32_epi8 emulated::cvtepi32_epi8
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtepi8_epi16 emulated::cvtepi8_epi16
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepu8_epi16 emulated::cvtepu8_epi16
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#define _mm512_dpbusd_epi32 emulated::dpbusd_epi32
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps emulated::extractf32x8_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#undef _mm512_inserti64x4
#define _mm512_inserti64x4 emulated::inserti64x4
#define _mm512_loadu_ps emulated::loadu_ps
#define _mm512_loadu_si512 emulated::loadu_si512
#define _mm512_mask_mov_ps emulated::mask_mov_ps
#define _mm512_mask_permutexvar_epi16 emulated::mask_permutexvar_epi16
#undef _mm512_mask_shuffle_epi32
#define _mm512_mask_shuffle_epi32 emulated::mask_shuffle_epi32
#define _mm512_maskz_loadu_epi8 emulated::maskz_loadu_epi8
#define _mm512_max_epi32 emulated::max_epi32
#define _mm512_mul_ps emulated::mul_ps
#define _mm512_permutex2var_ps emulated::permutex2var_ps
#define _mm512_permutexvar_epi16 emulated::permutexvar_epi16
#define _mm512_permutexvar_epi8 emulated::permutexvar_epi8
#define _mm512_permutexvar_ps emulated::permutexvar_ps
#define _mm512_reduce_add_epi32 emulated::reduce_add_epi32
#define _mm512_reduce_max_epi32 emulated::reduce_max_epi32
#define _mm512_set1_epi16 emulated::set1_epi16
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_set1_epi8 emulated::set1_epi8
#define _mm512_set1_ps emulated::set1_ps
#define _mm512_set_epi64 emulated::set_epi64
#undef _mm512_setr_epi32
#define _mm512_setr_epi32 emulated::setr_epi32
#undef _mm512_setr_ps
#define _mm512_setr_ps emulated::setr_ps
#define _mm512_setzero_ps emulated::setzero_ps
#define _mm512_setzero_si512 emulated::setzero_si512
#define _mm512_shuffle_epi8 emulated::shuffle_epi8
#define _mm512_slli_epi16 emulated::slli_epi16
#define _mm512_slli_epi32 emulated::slli_epi32
#define _mm512_srai_epi32 emulated::srai_epi32
#define _mm512_srli_epi16 emulated::srli_epi16
#define _mm512_srli_epi32 emulated::srli_epi32
#define _mm512_srlv_epi16 emulated::srlv_epi16
#define _mm512_store_si512 emulated::storeu
#define _mm512_storeu_ps emulated::storeu_ps
#undef _mm512_ternarylogic_epi32
#define _mm512_ternarylogic_epi32 emulated::ternarylogic
#define _mm512_unpackhi_epi32 emulated::unpackhi_epi32
#define _mm512_unpacklo_epi32 emulated::unpacklo_epi32
