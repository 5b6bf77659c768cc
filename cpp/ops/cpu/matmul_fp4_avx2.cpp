// FP4 products in integers with AVX2: NVFP4 (0.5625 bytes a weight) and MXFP4 (0.53).
//
// Activations are int16 with one FP32 scale for 128 columns (amax / 32767): their error is a small
// part of what rounding to BF16 costs. An E2M1 code is looked up as the byte 2 * E2M1 in the upper
// half of an int16, so that neither sign extension nor masks are needed; pmaddwd sums products
// exactly (at most 8 pairs of 12 * 256 * 32767 meet in an int32: 8.1e8). Each block's sum becomes
// FP32 and is multiplied with its block scale, 128 columns are summed so, multiplied with the scale
// of the activations and added to the accumulator of (row, token).
//
// Layout of 128 columns, 64 bytes: registers A = bytes [0, 16) and [32, 48), B = [16, 32) and
// [48, 64). Low and high nibbles apart and unpacked, register 2q + h of int16 holds columns
// 64 lane + 16 q + 2 i + h, i = 0 .. 7; quarter q of the lanes are blocks q and 4 + q of NVFP4, a
// pair of quarters is a block of MXFP4. Packed activations lie in that order, [cols / 128][8][16],
// then their scales.
#include <cstring>
#include <immintrin.h>

#include "ops/cpu/matmul_blocked.h"

namespace dsfp4::ops::cpu {
namespace {

using format::WeightFormat;
using format::WeightView;

constexpr std::int64_t kGroup = 128;  // columns under one activation scale
constexpr float kUnit = 1.0f / 512;   // a looked-up weight is E2M1 * 512

inline std::int64_t groups_of(std::int64_t cols) { return (cols + kGroup - 1) / kGroup; }

std::size_t packed_i16_bytes(std::int64_t cols) {
  return static_cast<std::size_t>(groups_of(cols) * 256 + (groups_of(cols) * 4 + 63) / 64 * 64);
}

inline const float* group_scales(const std::byte* row, std::int64_t cols) {
  return reinterpret_cast<const float*>(row + groups_of(cols) * 256);
}

// Places of 16 columns 2i + h: columns 0, 2, .. 14 in one register, 1, 3, .. 15 in the next.
inline void place_16(const float* x, __m256 inverse, std::int16_t* even, std::int16_t* odd) {
  const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), inverse));
  const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8), inverse));
  const __m256i mixed = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
  const __m256i apart = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1,
                                         4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  // Each lane: its even columns, then its odd ones; bring the even ones together.
  const __m256i sorted = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(mixed, apart), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(even), _mm256_castsi256_si128(sorted));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(odd), _mm256_extracti128_si256(sorted, 1));
}

// 128 floats to int16; returns the scale. A NaN or an infinity makes the whole group NaN.
float pack_group(const float* x, std::int16_t* out) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i largest = _mm256_setzero_si256();
  for (int i = 0; i < kGroup; i += 8) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    largest = _mm256_max_epi32(largest, _mm256_and_si256(bits, magnitude));
  }
  alignas(32) std::int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), largest);
  std::int32_t bits = 0;
  for (const std::int32_t lane : lanes) bits = lane > bits ? lane : bits;
  float amax;
  std::memcpy(&amax, &bits, sizeof(amax));
  // Below 2^-100 the inverse would overflow; such activations count as zeros.
  const bool finite = bits < 0x7f800000;
  const bool usable = finite && amax >= 0x1p-100f;
  const __m256 inverse = _mm256_set1_ps(usable ? 32767.0f / amax : 0.0f);
  const float zeros[16] = {};
  for (int q = 0; q < 4; ++q) {
    for (int lane = 0; lane < 2; ++lane) {
      place_16(usable ? x + 64 * lane + 16 * q : zeros, inverse, out + 32 * q + 8 * lane,
               out + 32 * q + 16 + 8 * lane);
    }
  }
  if (!finite) return __builtin_nanf("");
  return usable ? amax * (kUnit / 32767.0f) : 0.0f;
}

void pack_i16(const float* x, std::int64_t cols, bool, std::byte* out) {
  auto* scales = reinterpret_cast<float*>(out + groups_of(cols) * 256);
  for (std::int64_t i = 0; i < cols; i += kGroup) {
    const std::int64_t n = lesser(kGroup, cols - i);
    float tail[kGroup] = {};
    const float* from = x + i;
    if (n < kGroup) {
      std::memcpy(tail, from, static_cast<std::size_t>(n) * sizeof(float));
      from = tail;
    }
    const std::int64_t group = i / kGroup;
    scales[group] = pack_group(from, reinterpret_cast<std::int16_t*>(out + group * 256));
  }
}

inline __m256i load_pair(const std::uint8_t* low, const std::uint8_t* high) {
  return _mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
}

// Four registers of int16 weights, times 256, of 32 bytes.
inline void decode_codes(__m256i bytes, __m256i* w) {
  const __m256i table = _mm256_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12, 0,
                                         1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
  const __m256i mask = _mm256_set1_epi8(15);
  const __m256i zero = _mm256_setzero_si256();
  const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(bytes, mask));
  const __m256i high =
      _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask));
  w[0] = _mm256_unpacklo_epi8(zero, low);
  w[1] = _mm256_unpacklo_epi8(zero, high);
  w[2] = _mm256_unpackhi_epi8(zero, low);
  w[3] = _mm256_unpackhi_epi8(zero, high);
}

// Block scales of 128 columns, each in the four places where pmaddwd leaves its block's sum: NVFP4
// four registers (blocks q and 4 + q), MXFP4 two (blocks b and 2 + b).
inline void decode_scales_nvfp4(const std::uint8_t* codes, __m256* s) {
  const __m256i wide =
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
  const __m256i bits = _mm256_and_si256(_mm256_slli_epi32(wide, 20),
                                        _mm256_set1_epi32(static_cast<int>(0x87f00000u)));
  const __m256i nan = _mm256_set1_epi32(0x07f00000);
  const __m256i bad = _mm256_cmpeq_epi32(_mm256_and_si256(bits, nan), nan);
  const __m256 value = _mm256_or_ps(
      _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(0x1p120f)), _mm256_castsi256_ps(bad));
  s[0] = _mm256_permute_ps(value, 0x00);
  s[1] = _mm256_permute_ps(value, 0x55);
  s[2] = _mm256_permute_ps(value, 0xaa);
  s[3] = _mm256_permute_ps(value, 0xff);
}

inline void decode_scales_mxfp4(const std::uint8_t* codes, __m256* s) {
  std::int32_t four;
  std::memcpy(&four, codes, sizeof(four));
  const __m128i wide = _mm_cvtepu8_epi32(_mm_cvtsi32_si128(four));
  const __m128i least = _mm_set1_epi32(0x00400000);  // code 0 is 2^-127
  const __m128i bad = _mm_cmpeq_epi32(wide, _mm_set1_epi32(255));
  const __m128i bits = _mm_or_si128(_mm_max_epi32(_mm_slli_epi32(wide, 23), least), bad);
  const __m256 both = _mm256_castsi256_ps(_mm256_broadcastsi128_si256(bits));
  s[0] = _mm256_permutevar8x32_ps(both, _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2));
  s[1] = _mm256_permutevar8x32_ps(both, _mm256_setr_epi32(1, 1, 1, 1, 3, 3, 3, 3));
}

template <WeightFormat format>
struct Decoded {
  static constexpr int kScales = format == WeightFormat::kNvfp4 ? 4 : 2;
  __m256i w[8];
  __m256 s[kScales];
};

// `data`: 64 bytes, `scales`: 8 or 4.
template <WeightFormat format>
inline void decode_group(const std::uint8_t* data, const std::uint8_t* scales, Decoded<format>& d) {
  decode_codes(load_pair(data, data + 32), d.w);
  decode_codes(load_pair(data + 16, data + 48), d.w + 4);
  if constexpr (format == WeightFormat::kNvfp4) {
    decode_scales_nvfp4(scales, d.s);
  } else {
    decode_scales_mxfp4(scales, d.s);
  }
}

// The sum over 128 columns of weight * activation, in the units of the activations.
template <WeightFormat format>
inline __m256 dot_group(const Decoded<format>& d, const __m256i* x) {
  __m256i q[4];
  for (int i = 0; i < 4; ++i) {
    q[i] = _mm256_add_epi32(_mm256_madd_epi16(d.w[2 * i], _mm256_load_si256(x + 2 * i)),
                            _mm256_madd_epi16(d.w[2 * i + 1], _mm256_load_si256(x + 2 * i + 1)));
  }
  if constexpr (format == WeightFormat::kNvfp4) {
    __m256 sum = _mm256_mul_ps(_mm256_cvtepi32_ps(q[0]), d.s[0]);
    for (int i = 1; i < 4; ++i) sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(q[i]), d.s[i], sum);
    return sum;
  } else {
    const __m256 first = _mm256_cvtepi32_ps(_mm256_add_epi32(q[0], q[1]));
    const __m256 second = _mm256_cvtepi32_ps(_mm256_add_epi32(q[2], q[3]));
    return _mm256_fmadd_ps(second, d.s[1], _mm256_mul_ps(first, d.s[0]));
  }
}

inline float total_of(__m256 sum) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// The bytes and scales of a last group, short of 128 columns, padded with zeros.
template <WeightFormat format>
struct Tail {
  Tail(const std::uint8_t* from_data, const std::uint8_t* from_scales, std::int64_t cols) {
    constexpr std::int64_t kBlock = format == WeightFormat::kNvfp4 ? 16 : 32;
    std::memcpy(data, from_data, static_cast<std::size_t>(cols / 2));
    std::memcpy(scales, from_scales, static_cast<std::size_t>(cols / kBlock));
  }
  std::uint8_t data[64] = {};
  std::uint8_t scales[8] = {};
};

template <WeightFormat format>
struct Row {
  static constexpr std::int64_t kBlock = format == WeightFormat::kNvfp4 ? 16 : 32;
  Row(const WeightView& w, std::int64_t row)
      : data(reinterpret_cast<const std::uint8_t*>(w.data) + row * w.cols / 2),
        scales(reinterpret_cast<const std::uint8_t*>(w.scales) + row * w.cols / kBlock) {}
  // A page ahead of a group: rows follow each other.
  void prefetch_ahead(std::int64_t group) const {
    constexpr std::int64_t kPage = 4096;
    prefetch(data + 64 * group + kPage);
    prefetch(scales + kGroup / kBlock * (group + kPage / 64));
  }
  const std::uint8_t* data;
  const std::uint8_t* scales;
};

// Few tokens: a row is decoded in registers, next to the multiply.
template <WeightFormat format, int count>
void multiply_direct(const Product& p) {
  const std::int64_t cols = p.weight->cols;
  const std::int64_t whole = cols / kGroup;
  const float scale = scale_of_all(*p.weight);
  const __m256i* x[count];
  const float* x_scales[count];
  float* y[count];
  for (int t = 0; t < count; ++t) {
    x[t] = reinterpret_cast<const __m256i*>(x_row(p, t));
    x_scales[t] = group_scales(x_row(p, t), cols);
    y[t] = y_row(p, t);
  }
  for (std::int64_t row = p.row_begin; row < p.row_end; ++row) {
    const Row<format> w(*p.weight, row);
    __m256 sum[count];
    for (int t = 0; t < count; ++t) sum[t] = _mm256_setzero_ps();
    const auto add = [&](std::int64_t group, const std::uint8_t* data, const std::uint8_t* scales)
        __attribute__((always_inline)) {
      Decoded<format> d;
      decode_group(data, scales, d);
      for (int t = 0; t < count; ++t) {
        sum[t] = _mm256_fmadd_ps(dot_group(d, x[t] + 8 * group), _mm256_set1_ps(x_scales[t][group]),
                                 sum[t]);
      }
    };
    for (std::int64_t g = 0; g < whole; ++g) {
      w.prefetch_ahead(g);
      add(g, w.data + 64 * g, w.scales + kGroup / Row<format>::kBlock * g);
    }
    if (whole * kGroup < cols) {
      const Tail<format> tail(w.data + 64 * whole, w.scales + kGroup / Row<format>::kBlock * whole,
                              cols - whole * kGroup);
      add(whole, tail.data, tail.scales);
    }
    for (int t = 0; t < count; ++t) y[t][row - p.row_begin] = total_of(sum[t]) * scale;
  }
}

// Many tokens: 2 rows x 2 tokens meet in registers.
template <WeightFormat format>
struct Blocked {
  using Sum = __m256;
  static constexpr int kRows = 2;
  static constexpr int kTokens = 2;
  static constexpr std::int64_t kChunk = 512;
  static constexpr int kGroups = 4;
  struct Weights {
    Decoded<format> group[kRows][kChunk / kGroup];
    std::int64_t cols;  // of the matrix
  };

  static void decode(const WeightView& w, std::int64_t row, int index, std::int64_t begin,
                     std::int64_t end, Weights& weights) {
    weights.cols = w.cols;
    const Row<format> from(w, row);
    for (std::int64_t c = begin; c < end; c += kGroup) {
      Decoded<format>& to = weights.group[index][(c - begin) / kGroup];
      const std::uint8_t* data = from.data + c / 2;
      const std::uint8_t* scales = from.scales + c / Row<format>::kBlock;
      if (end - c >= kGroup) {
        decode_group(data, scales, to);
      } else {
        const Tail<format> tail(data, scales, end - c);
        decode_group(tail.data, tail.scales, to);
      }
    }
  }

  template <int count>
  static void tile(const Weights& w, std::int64_t begin, std::int64_t end,
                   const std::byte* const* rows, Sum* sums) {
    const __m256i* x[count];
    const float* scales[count];
    Sum sum[count][kRows];
    for (int t = 0; t < count; ++t) {
      x[t] = reinterpret_cast<const __m256i*>(rows[t]) + begin / kGroup * 8;
      scales[t] = group_scales(rows[t], w.cols) + begin / kGroup;
      for (int r = 0; r < kRows; ++r) sum[t][r] = sums[t * kRows + r];
    }
    const std::int64_t groups = groups_of(end - begin);
    for (std::int64_t g = 0; g < groups; ++g) {
      for (int t = 0; t < count; ++t) {
        const __m256 scale = _mm256_set1_ps(scales[t][g]);
        for (int r = 0; r < kRows; ++r) {
          sum[t][r] = _mm256_fmadd_ps(dot_group(w.group[r][g], x[t] + 8 * g), scale, sum[t][r]);
        }
      }
    }
    for (int t = 0; t < count; ++t) {
      for (int r = 0; r < kRows; ++r) sums[t * kRows + r] = sum[t][r];
    }
  }

  static float total(const Sum& sum) { return total_of(sum); }
};

template <WeightFormat format>
void multiply(const Product& p, std::byte* scratch) {
  const bool few = for_few<6>(p.tokens, [&](auto count) { multiply_direct<format, count>(p); });
  if (!few) multiply_blocked<Blocked<format>>(p, scratch);
}

void multiply_fp4(const Product& p, std::byte* scratch) {
  if (p.weight->format == WeightFormat::kNvfp4) return multiply<WeightFormat::kNvfp4>(p, scratch);
  multiply<WeightFormat::kMxfp4>(p, scratch);
}

}  // namespace

const Matmul kMatmulFp4Avx2 = {
    "fp4_i16_avx2",   1,        sizeof(BlockedScratch<Blocked<WeightFormat::kNvfp4>>),
    packed_i16_bytes, pack_i16, multiply_fp4};

}  // namespace dsfp4::ops::cpu
