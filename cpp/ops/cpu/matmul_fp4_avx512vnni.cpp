// FP4 in the decode phase with AVX-512 VNNI and VBMI: NVFP4 (0.5625 bytes a weight), MXFP4 (0.53),
// any number of tokens, in exact integers.
//
// Activations are integers of up to 32639 with one FP32 scale for 256 columns, written as two
// digits of base 256, each -128 .. 127; their error is a small part of what rounding to BF16 costs.
// A weight is looked up as the byte 12 + 2 * E2M1, 0 .. 24, as vpdpbusd multiplies unsigned bytes
// with signed ones; what the 12 adds, 12 times the sum of the activations, is known when they are
// packed. Four vpdpbusd with the upper digits, a shift by 8 bits and four with the lower digits are
// the exact sum of a block of 16 columns (at most 16 * 24 * 32639: 1.3e7); it becomes FP32 and is
// multiplied with its block scale and with the scale of the activations.
//
// A group is 256 columns, 128 bytes: halves A and B of 16 words of 32 bits. A block of NVFP4 is two
// words, a block of MXFP4 four. Word 2j + p of A and word 2j + p of B meet in lanes 2j and 2j + 1
// of register p, so that lane 2j has all of block j of A and lane 2j + 1 all of block j of B. The
// low nibbles of register p are columns 0, 2, 4, 6 of its words, the high nibbles columns 1, 3, 5,
// 7; no mask is needed, as vpermb looks at 6 bits and the table of 16 stands four times in 64
// bytes. Packed activations of a group: [upper, lower digit][p][low, high nibbles] of 64 bytes,
// then 16 int32, what each lane owes; after all groups of the row, their scales.
//
// Up to 4 tokens: 2 rows at a time are decoded in registers, and the next 2 are prefetched. One
// token and 256 NVFP4 weights take 25 vector instructions, another token 12: with two ports 10
// bytes a cycle. With vdpbf16ps, of which Intel's cores do one in two cycles, 128 weights took 8
// cycles. More tokens: matmul_blocked.h with tiles of 2 rows x 6 tokens.
#include <cstring>
#include <immintrin.h>

#include "ops/cpu/avx512.h"
#include "ops/cpu/matmul_blocked.h"

namespace dsfp4::ops::cpu {
namespace {

using format::WeightFormat;
using format::WeightView;

constexpr std::int64_t kGroup = 256;
constexpr std::int64_t kGroupBytes = kGroup / 2;
constexpr int kRows = 2;
constexpr int kMost = 32639;       // 127 * 256 + 127
constexpr float kUnit = 1.0f / 2;  // a looked-up weight is 12 + 2 * E2M1

// The packed activations of a group.
struct Digits {
  __m512i upper[4];
  __m512i lower[4];
  __m512i owed;
};

inline std::int64_t groups_of(std::int64_t cols) { return (cols + kGroup - 1) / kGroup; }

std::size_t packed_digits_bytes(std::int64_t cols) {
  const auto groups = static_cast<std::size_t>(groups_of(cols));
  return groups * sizeof(Digits) + (groups * sizeof(float) + 63) / 64 * 64;
}

inline const Digits* digits_of(const std::byte* row) {
  return reinterpret_cast<const Digits*>(row);
}
inline const float* scales_of(const std::byte* row, std::int64_t cols) {
  return reinterpret_cast<const float*>(row +
                                        sizeof(Digits) * static_cast<std::size_t>(groups_of(cols)));
}

// ---- activations -------------------------------------------------------------------------------

// One digit of columns c .. c + 63 (half A) and c + 128 .. c + 191 (B), in the order of the
// columns, into lanes 8m .. 8m + 7 of four registers, c = 64m.
inline void place(const std::byte* a, const std::byte* b, std::int64_t m, __m512i* registers) {
  // Words of even numbers, their columns 0, 2, 4, 6, then 1, 3, 5, 7; then those of odd numbers.
  const __m512i order =
      _mm512_setr_epi32(0x06040200, 0x16141210, 0x26242220, 0x36343230, 0x07050301, 0x17151311,
                        0x27252321, 0x37353331, 0x0e0c0a08, 0x1e1c1a18, 0x2e2c2a28, 0x3e3c3a38,
                        0x0f0d0b09, 0x1f1d1b19, 0x2f2d2b29, 0x3f3d3b39);
  const __m512i in_a = _mm512_permutexvar_epi8(order, load_512(a));
  const __m512i in_b = _mm512_permutexvar_epi8(order, load_512(b));
  alignas(64) std::byte low[64];
  alignas(64) std::byte high[64];
  _mm512_store_si512(low, _mm512_unpacklo_epi32(in_a, in_b));
  _mm512_store_si512(high, _mm512_unpackhi_epi32(in_a, in_b));
  for (std::int64_t i = 0; i < 4; ++i) {
    std::byte* to = reinterpret_cast<std::byte*>(registers + i) + 32 * m;
    std::memcpy(to, low + 16 * i, 16);
    std::memcpy(to + 16, high + 16 * i, 16);
  }
}

// The largest magnitude of a group; an infinity or a NaN if there is one.
inline float largest_of(const float* x) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();
  for (std::int64_t i = 0; i < kGroup; i += 16) {
    largest = _mm512_max_epi32(largest, _mm512_and_si512(load_512(x + i), magnitude));
  }
  const std::int32_t bits = _mm512_reduce_max_epi32(largest);
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Returns the scale. A NaN or an infinity makes the whole group NaN.
float pack_group(const float* x, std::byte* out) {
  const float largest = largest_of(x);
  // Below 2^-100 the inverse would overflow; such activations count as zeros.
  const bool finite = largest <= 0x1.fffffep127f;
  const bool usable = finite && largest >= 0x1p-100f;
  const __m512 inverse = _mm512_set1_ps(usable ? static_cast<float>(kMost) / largest : 0.0f);
  alignas(64) std::byte upper[kGroup];
  alignas(64) std::byte lower[kGroup];
  Digits digits;
  std::int32_t owed[16];
  const float zeros[16] = {};
  for (std::int64_t i = 0; i < 16; ++i) {
    const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(usable ? x + 16 * i : zeros), inverse);
    const __m512i value = _mm512_cvtps_epi32(scaled);
    const __m512i half = _mm512_set1_epi32(128);
    const __m128i above = _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(value, half), 8));
    const __m128i below = _mm512_cvtepi32_epi8(value);
    std::memcpy(upper + 16 * i, &above, 16);
    std::memcpy(lower + 16 * i, &below, 16);
    owed[i % 8 * 2 + i / 8] = -12 * _mm512_reduce_add_epi32(value);
  }
  for (std::int64_t m = 0; m < 2; ++m) {
    place(upper + 64 * m, upper + 64 * m + 128, m, digits.upper);
    place(lower + 64 * m, lower + 64 * m + 128, m, digits.lower);
  }
  std::memcpy(&digits.owed, owed, sizeof(owed));
  std::memcpy(out, &digits, sizeof(digits));
  if (!finite) return __builtin_nanf("");
  return usable ? largest * (kUnit / static_cast<float>(kMost)) : 0.0f;
}

void pack_digits(const float* x, std::int64_t cols, bool, std::byte* out) {
  auto* scales = const_cast<float*>(scales_of(out, cols));
  for (std::int64_t c = 0; c < cols; c += kGroup) {
    float tail[kGroup] = {};
    const float* from = x + c;
    if (cols - c < kGroup) {
      std::memcpy(tail, from, static_cast<std::size_t>(cols - c) * sizeof(float));
      from = tail;
    }
    const std::int64_t group = c / kGroup;
    scales[group] = pack_group(from, out + sizeof(Digits) * static_cast<std::size_t>(group));
  }
}

// ---- weights -----------------------------------------------------------------------------------

inline __mmask64 first_bytes(std::int64_t count) {
  if (count <= 0) return 0;
  return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
}

struct Nvfp4Scales {
  static constexpr std::int64_t kCols = 16;
  static constexpr int kBytes = 16;  // of a group

  // Code j into lane 2j, code 8 + j into lane 2j + 1, its sign on top; then the bits of a float
  // that is 2^120 times too small, subnormals included.
  static __m512 decode(__m128i codes) {
    const __m512i order =
        _mm512_setr_epi32(0x00ffffff, 0x08ffffff, 0x01ffffff, 0x09ffffff, 0x02ffffff, 0x0affffff,
                          0x03ffffff, 0x0bffffff, 0x04ffffff, 0x0cffffff, 0x05ffffff, 0x0dffffff,
                          0x06ffffff, 0x0effffff, 0x07ffffff, 0x0fffffff);
    const __m512i spread =
        _mm512_srai_epi32(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(codes), order), 4);
    const __m512i bits = _mm512_and_si512(spread, _mm512_set1_epi32(static_cast<int>(0x87f00000u)));
    return _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(0x1p120f));
  }
  static __m128i load(const std::uint8_t* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  }
  static __mmask64 nan(__m512i codes) {
    const __m512i magnitude = _mm512_set1_epi8(0x7f);
    return _mm512_cmpeq_epi8_mask(_mm512_and_si512(codes, magnitude), magnitude);
  }
};

struct Mxfp4Scales {
  static constexpr std::int64_t kCols = 32;
  static constexpr int kBytes = 8;

  // Code j into lanes 4j and 4j + 2, code 4 + j into lanes 4j + 1 and 4j + 3, as the exponent of a
  // float; code 0 is 2^-127.
  static __m512 decode(__m128i codes) {
    const __m512i order =
        _mm512_setr_epi32(0x00ffffff, 0x04ffffff, 0x00ffffff, 0x04ffffff, 0x01ffffff, 0x05ffffff,
                          0x01ffffff, 0x05ffffff, 0x02ffffff, 0x06ffffff, 0x02ffffff, 0x06ffffff,
                          0x03ffffff, 0x07ffffff, 0x03ffffff, 0x07ffffff);
    const __m512i bits =
        _mm512_srli_epi32(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(codes), order), 1);
    return _mm512_castsi512_ps(_mm512_max_epi32(bits, _mm512_set1_epi32(0x00400000)));
  }
  static __m128i load(const std::uint8_t* from) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  }
  static __mmask64 nan(__m512i codes) {
    return _mm512_cmpeq_epi8_mask(codes, _mm512_set1_epi8(-1));
  }
};

// 256 columns of a row.
struct Weights {
  __m512i w[4];
  __m512 scale;
};

template <class Scales>
struct Row {
  Row(const WeightView& weight, std::int64_t row)
      : cols(weight.cols),
        data(reinterpret_cast<const std::uint8_t*>(weight.data) + row * weight.cols / 2),
        scales(reinterpret_cast<const std::uint8_t*>(weight.scales) +
               row * weight.cols / Scales::kCols) {}

  static Weights decode(__m512i a, __m512i b, __m128i scale_codes) {
    const __m512i values =
        _mm512_setr_epi32(0x0f0e0d0c, 0x18141210, 0x090a0b0c, 0x00040608, 0x0f0e0d0c, 0x18141210,
                          0x090a0b0c, 0x00040608, 0x0f0e0d0c, 0x18141210, 0x090a0b0c, 0x00040608,
                          0x0f0e0d0c, 0x18141210, 0x090a0b0c, 0x00040608);
    const __m512i even = _mm512_mask_shuffle_epi32(a, 0xaaaa, b, _MM_PERM_CCAA);
    const __m512i odd = _mm512_mask_shuffle_epi32(b, 0x5555, a, _MM_PERM_DDBB);
    return {{_mm512_permutexvar_epi8(even, values),
             _mm512_permutexvar_epi8(_mm512_srli_epi16(even, 4), values),
             _mm512_permutexvar_epi8(odd, values),
             _mm512_permutexvar_epi8(_mm512_srli_epi16(odd, 4), values)},
            Scales::decode(scale_codes)};
  }
  Weights whole(std::int64_t i) const {
    const std::uint8_t* from = data + kGroupBytes * i;
    return decode(load_512(from), load_512(from + 64), Scales::load(scales + Scales::kBytes * i));
  }
  // The last one, if it is not whole: code 0 past the last column, where activations are zeros.
  Weights part(std::int64_t i) const {
    const std::int64_t left = cols - i * kGroup;
    const std::uint8_t* from = data + kGroupBytes * i;
    std::uint8_t codes[16] = {};
    std::memcpy(codes, scales + Scales::kBytes * i, static_cast<std::size_t>(left / Scales::kCols));
    return decode(_mm512_maskz_loadu_epi8(first_bytes(left / 2), from),
                  _mm512_maskz_loadu_epi8(first_bytes(left / 2 - 64), from + 64),
                  Scales::load(codes));
  }
  /// Whether a block of columns [begin, end) has the scale NaN.
  bool nan(std::int64_t begin, std::int64_t end) const {
    __mmask64 found = 0;
    for (std::int64_t b = begin / Scales::kCols; b < end / Scales::kCols; b += 64) {
      const __mmask64 mask = first_bytes(end / Scales::kCols - b);
      found |= Scales::nan(_mm512_maskz_loadu_epi8(mask, scales + b));
    }
    return found != 0;
  }
  void prefetch_group(std::int64_t i) const {
    prefetch(data + kGroupBytes * i);
    prefetch(data + kGroupBytes * i + 64);
    prefetch(scales + Scales::kBytes * i);
  }

  std::int64_t cols;
  const std::uint8_t* data;
  const std::uint8_t* scales;
};

// Adds a group of kRows rows times `count` tokens.
template <int count>
inline void add_group(const Weights* rows, const Digits* const* x, const float* const* scales,
                      std::int64_t group, __m512 (*sum)[kRows]) {
  for (int t = 0; t < count; ++t) {
    const Digits& digits = x[t][group];
    const __m512 scale = _mm512_set1_ps(scales[t][group]);
    for (int r = 0; r < kRows; ++r) {
      __m512i total = _mm512_setzero_si512();
      for (int i = 0; i < 4; ++i) {
        total = _mm512_dpbusd_epi32(total, rows[r].w[i], digits.upper[i]);
      }
      total = _mm512_add_epi32(_mm512_slli_epi32(total, 8), digits.owed);
      for (int i = 0; i < 4; ++i) {
        total = _mm512_dpbusd_epi32(total, rows[r].w[i], digits.lower[i]);
      }
      const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(total), rows[r].scale);
      sum[t][r] = _mm512_fmadd_ps(scaled, scale, sum[t][r]);
    }
  }
}

// ---- few tokens --------------------------------------------------------------------------------

// The row that is asked for while `row` is computed: some 8 KB further on, in what comes next if
// this thread's rows end before; `row` itself if that is not known.
template <class Scales>
inline Row<Scales> row_ahead(const Product& p, std::int64_t row) {
  constexpr std::int64_t kAheadBytes = 4096;
  const std::int64_t rows = kAheadBytes / kRows / (p.weight->cols / 2 + 1) * kRows;
  const std::int64_t ahead = row + (rows > kRows ? rows : kRows);
  if (ahead < p.row_end) return {*p.weight, ahead};
  if (p.next == nullptr) return {*p.weight, row};
  return {*p.next, lesser(p.row_begin + ahead - p.row_end, p.row_end - 1)};
}

template <class Scales, int count>
void multiply_direct(const Product& p) {
  const std::int64_t cols = p.weight->cols;
  const std::int64_t whole = cols / kGroup;
  const float scale = scale_of_all(*p.weight);
  const Digits* x[count];
  const float* x_scales[count];
  for (int t = 0; t < count; ++t) {
    x[t] = digits_of(x_row(p, t));
    x_scales[t] = scales_of(x_row(p, t), cols);
  }
  for (std::int64_t row = p.row_begin; row < p.row_end; row += kRows) {
    // Past the last row: that row once more, never written.
    const Row<Scales> rows[kRows] = {{*p.weight, row}, {*p.weight, lesser(row + 1, p.row_end - 1)}};
    const Row<Scales> ahead[kRows] = {row_ahead<Scales>(p, row), row_ahead<Scales>(p, row + 1)};
    __m512 sum[count][kRows];
    for (int t = 0; t < count; ++t) sum[t][0] = sum[t][1] = _mm512_setzero_ps();
    for (std::int64_t i = 0; i < whole; ++i) {
      const Weights weights[kRows] = {rows[0].whole(i), rows[1].whole(i)};
      ahead[0].prefetch_group(i);
      ahead[1].prefetch_group(i);
      add_group<count>(weights, x, x_scales, i, sum);
    }
    if (whole * kGroup < cols) {
      const Weights weights[kRows] = {rows[0].part(whole), rows[1].part(whole)};
      add_group<count>(weights, x, x_scales, whole, sum);
    }
    for (int r = 0; r < kRows && row + r < p.row_end; ++r) {
      const bool nan = rows[r].nan(0, cols);
      for (int t = 0; t < count; ++t) {
        y_row(p, t)[row + r - p.row_begin] = nan ? __builtin_nanf("") : total_of(sum[t][r]) * scale;
      }
    }
  }
}

// ---- more --------------------------------------------------------------------------------------

template <class Scales>
struct Blocked {
  using Sum = __m512;
  static constexpr int kRows = cpu::kRows;
  static constexpr int kTokens = 6;
  static constexpr std::int64_t kChunk = 1024;
  static constexpr int kGroups = 1;
  struct Weights {
    cpu::Weights group[kChunk / kGroup][kRows];
    std::int64_t cols;  // of the matrix
  };

  static void decode(const WeightView& w, std::int64_t row, int index, std::int64_t begin,
                     std::int64_t end, Weights& weights) {
    weights.cols = w.cols;
    const Row<Scales> from(w, row);
    const Row<Scales> ahead(w, row + kRows);
    const std::int64_t first = begin / kGroup;
    const std::int64_t last = end / kGroup;
    for (std::int64_t i = first; i < last; ++i) {
      weights.group[i - first][index] = from.whole(i);
      ahead.prefetch_group(i);
    }
    if (last * kGroup < end) weights.group[last - first][index] = from.part(last);
    if (!from.nan(begin, end)) return;
    for (auto& group : weights.group) group[index].scale = _mm512_set1_ps(__builtin_nanf(""));
  }

  template <int count>
  static void tile(const Weights& w, std::int64_t begin, std::int64_t end,
                   const std::byte* const* rows, Sum* sums) {
    const Digits* x[count];
    const float* scales[count];
    Sum sum[count][kRows];
    for (int t = 0; t < count; ++t) {
      x[t] = digits_of(rows[t]) + begin / kGroup;
      scales[t] = scales_of(rows[t], w.cols) + begin / kGroup;
      for (int r = 0; r < kRows; ++r) sum[t][r] = sums[t * kRows + r];
    }
    const std::int64_t groups = groups_of(end - begin);
    for (std::int64_t i = 0; i < groups; ++i) add_group<count>(w.group[i], x, scales, i, sum);
    for (int t = 0; t < count; ++t) {
      for (int r = 0; r < kRows; ++r) sums[t * kRows + r] = sum[t][r];
    }
  }

  static float total(const Sum& sum) { return total_of(sum); }
};

template <class Scales>
void multiply(const Product& p, std::byte* scratch) {
  const bool few = for_few<4>(p.tokens, [&](auto count) { multiply_direct<Scales, count>(p); });
  if (!few) multiply_blocked<Blocked<Scales>>(p, scratch);
}

void multiply_fp4(const Product& p, std::byte* scratch) {
  if (p.weight->format == WeightFormat::kNvfp4) return multiply<Nvfp4Scales>(p, scratch);
  multiply<Mxfp4Scales>(p, scratch);
}

}  // namespace

const Matmul kMatmulFp4Avx512Vnni = {
    "fp4_i16_avx512vnni", 4,           sizeof(BlockedScratch<Blocked<Nvfp4Scales>>),
    packed_digits_bytes,  pack_digits, multiply_fp4};

}  // namespace dsfp4::ops::cpu
