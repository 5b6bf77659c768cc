// Decoders to BF16 and packers of activations, for the files that multiply BF16 (AVX-512 BF16 and
// AMX); internal linkage, like matmul_blocked.h. 32 columns are one register.
//
// E2M1 times an E4M3 or E8M0 scale has at most 6 significant bits, and E4M3 has 4: a BF16 holds
// each exactly. (Below 2^-126, which only MXFP4 scales under 2^-125 reach, the products of BF16
// take a value for zero.)
//
// FP4: a register of 16 words is the table of one block's scale, so that a code is an index. The
// low nibbles of 16 bytes become words 0 .. 15, the high ones words 16 .. 31: columns 0, 2, .. 30,
// then 1, 3, .. 31, and activations are packed in that order.
#include <cstring>
#include <immintrin.h>

#include "ops/cpu/avx512.h"
#include "ops/cpu/matmul_blocked.h"

namespace dsfp4::ops::cpu {
namespace {

using format::WeightFormat;
using format::WeightView;

constexpr std::int64_t kStep = 32;  // columns of a register of BF16

inline std::int64_t steps_of(std::int64_t cols) { return (cols + kStep - 1) / kStep; }

inline __m512bh as_bf16(__m512i bits) {
  __m512bh value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline __m256i load_256(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
inline __m128i load_128(const void* from) {
  return _mm_loadu_si128(static_cast<const __m128i*>(from));
}

// ---- FP4 ---------------------------------------------------------------------------------------

// BF16 codes of the 16 values of E2M1 times each scale.
struct Fp4Table {
  alignas(64) std::uint16_t value[256][16];
};

// The BF16 code of magnitude * 2^exponent / 8, exact for magnitude < 256; 0 if too small for BF16's
// subnormals, infinity if too large.
constexpr std::uint16_t bf16_code(int magnitude, int exponent, bool negative) {
  const std::uint16_t sign = negative ? 0x8000 : 0;
  if (magnitude == 0) return sign;
  exponent -= 3;
  while (magnitude < 128) {  // 8 significant bits, the first is implied
    magnitude *= 2;
    --exponent;
  }
  const int biased = exponent + 7 + 127;
  if (biased >= 255) return sign | 0x7f80;
  if (biased > 0) {
    return static_cast<std::uint16_t>(sign | (biased << 7) | (magnitude & 127));
  }
  const int shift = 1 - biased;
  return static_cast<std::uint16_t>(sign | (shift < 8 ? magnitude >> shift : 0));
}

constexpr int kTwiceE2m1[8] = {0, 1, 2, 3, 4, 6, 8, 12};

constexpr Fp4Table kNvfp4Table = [] {
  Fp4Table table{};
  for (int scale = 0; scale < 256; ++scale) {
    const int e = (scale >> 3) & 15;
    const int mantissa =
        e == 0 ? scale & 7 : 8 + (scale & 7);  // value = mantissa * 2^(max(e,1)-10)
    for (int code = 0; code < 16; ++code) {
      const bool negative = ((scale >> 7) ^ (code >> 3)) != 0;
      table.value[scale][code] =
          (scale & 127) == 127
              ? std::uint16_t{0x7fc0}
              : bf16_code(mantissa * kTwiceE2m1[code & 7], (e == 0 ? 1 : e) - 10 - 1 + 3, negative);
    }
  }
  return table;
}();

constexpr Fp4Table kMxfp4Table = [] {
  Fp4Table table{};
  for (int scale = 0; scale < 256; ++scale) {
    for (int code = 0; code < 16; ++code) {
      table.value[scale][code] =
          scale == 255 ? std::uint16_t{0x7fc0}
                       : bf16_code(kTwiceE2m1[code & 7], scale - 127 - 1 + 3, (code >> 3) != 0);
    }
  }
  return table;
}();

// Words 0 .. 15: bytes, the low nibble in front; words 16 .. 31: their high nibbles.
inline __m512i spread_nibbles(const std::uint8_t* data) {
  const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
  const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_broadcastsi128_si256(load_128(data)));
  return _mm512_srlv_epi16(bytes, shifts);
}

struct Nvfp4 {
  static constexpr std::int64_t kScaleCols = 16;

  // Two blocks: the tables of their scales make one of 32 words; bit 4 of an index says which.
  static __m512i decode(const std::uint8_t* data, const std::uint8_t* scales) {
    const __m512i low_bits = _mm512_set1_epi16(15);
    const __m512i which = _mm512_set_epi64(0x0010001000100010, 0x0010001000100010, 0, 0,
                                           0x0010001000100010, 0x0010001000100010, 0, 0);
    const __m512i codes = _mm512_ternarylogic_epi32(spread_nibbles(data), low_bits, which, 0xea);
    const __m512i table =
        _mm512_inserti64x4(_mm512_castsi256_si512(load_256(kNvfp4Table.value[scales[0]])),
                           load_256(kNvfp4Table.value[scales[1]]), 1);
    return _mm512_permutexvar_epi16(codes, table);
  }
};

struct Mxfp4 {
  static constexpr std::int64_t kScaleCols = 32;

  // One block: its table twice, so that bit 4 of an index does not matter.
  static __m512i decode(const std::uint8_t* data, const std::uint8_t* scales) {
    const __m512i table = _mm512_broadcast_i64x4(load_256(kMxfp4Table.value[scales[0]]));
    return _mm512_permutexvar_epi16(spread_nibbles(data), table);
  }
};

// Bytes and scales of one row; `at` decodes 32 columns and reads no byte past the last column.
template <class Format>
struct Fp4Row {
  Fp4Row(const WeightView& w, std::int64_t row)
      : data(reinterpret_cast<const std::uint8_t*>(w.data) + row * w.cols / 2),
        scales(reinterpret_cast<const std::uint8_t*>(w.scales) +
               row * w.cols / Format::kScaleCols) {}

  __m512i whole(std::int64_t step) const {
    return Format::decode(data + 16 * step, scales + kStep / Format::kScaleCols * step);
  }
  // The last 16 columns of NVFP4.
  __m512i half(std::int64_t step) const {
    std::uint8_t bytes[16] = {};
    std::memcpy(bytes, data + 16 * step, 8);
    const std::uint8_t two[2] = {scales[2 * step], 0};
    return Format::decode(bytes, two);
  }

  const std::uint8_t* data;
  const std::uint8_t* scales;
};

// ---- FP8 and BF16 ------------------------------------------------------------------------------

inline __m512i e4m3_to_bf16(__m256i codes) {
  // By table: subnormals, mantissa * 2^-9, and NaN; bits 0 .. 4 of a code tell them apart.
  const __m512i special = _mm512_setr_epi32(0x3b000000, 0x3bc03b80, 0x3c203c00, 0x3c603c40, 0, 0, 0,
                                            0, 0, 0, 0, 0, 0, 0, 0, 0x7fc00000);
  const __m512i words = _mm512_cvtepi8_epi16(codes);
  const __m512i magnitude = _mm512_and_si512(words, _mm512_set1_epi16(0x7f));
  const __m512i normal =
      _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(0x3c00));
  // 8 less, without sign: subnormals are above all normal numbers then, as NaN is.
  const __mmask32 is_special = _mm512_cmpgt_epu16_mask(
      _mm512_add_epi16(magnitude, _mm512_set1_epi16(-8)), _mm512_set1_epi16(0x76));
  const __m512i value = _mm512_mask_permutexvar_epi16(normal, is_special, words, special);
  // value | (words & sign)
  return _mm512_ternarylogic_epi32(value, words, _mm512_set1_epi16(static_cast<short>(0x8000)),
                                   0xf8);
}

// `cols` < 32 codes.
inline __m512i e4m3_tail(const std::uint8_t* data, std::int64_t cols) {
  std::uint8_t bytes[kStep] = {};
  std::memcpy(bytes, data, static_cast<std::size_t>(cols));
  return e4m3_to_bf16(load_256(bytes));
}

inline __m512i bf16_tail(const std::uint8_t* data, std::int64_t cols) {
  std::uint8_t bytes[2 * kStep] = {};
  std::memcpy(bytes, data, static_cast<std::size_t>(2 * cols));
  return load_512(bytes);
}

inline float fp8_scale(const WeightView& w, std::int64_t row, std::int64_t tile) {
  const std::int64_t tiles = (w.cols + format::kFp8Tile - 1) / format::kFp8Tile;
  float scale;
  std::memcpy(&scale, w.scales + (row / format::kFp8Tile * tiles + tile) * 4, sizeof(scale));
  return scale;
}

// ---- activations -------------------------------------------------------------------------------

[[maybe_unused]] std::size_t packed_bf16_bytes(std::int64_t cols) {
  return static_cast<std::size_t>(steps_of(cols)) * 64;
}

template <bool kFp4Order>
void pack_bf16(const float* x, std::int64_t cols, bool, std::byte* out) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  for (std::int64_t i = 0; i < cols; i += kStep) {
    float tail[kStep] = {};
    const float* from = x + i;
    if (cols - i < kStep) {
      std::memcpy(tail, from, static_cast<std::size_t>(cols - i) * sizeof(float));
      from = tail;
    }
    const __m512 a = _mm512_loadu_ps(from);
    const __m512 b = _mm512_loadu_ps(from + 16);
    const __m512 first = kFp4Order ? _mm512_permutex2var_ps(a, even, b) : a;
    const __m512 second = kFp4Order ? _mm512_permutex2var_ps(a, odd, b) : b;
    const __m512bh both = _mm512_cvtne2ps_pbh(second, first);  // `first` into the lower half
    std::memcpy(out + 2 * i, &both, sizeof(both));
  }
}

}  // namespace
}  // namespace dsfp4::ops::cpu
