// FP32 products with AVX2 and FMA: FP8 (1 byte a weight, a multiplier for 128 columns), BF16 (2)
// and F32 (4) weights; FP4 has integers of its own (matmul_fp4_avx2.cpp) and comes here only with
// activations that must not be rounded.
//
// Up to 18 tokens, BF16 and FP8: decoded in registers, 4 rows x 3 tokens or 2 x 6 at a time, with
// prefetching 2 KB ahead in each row. 8 BF16 weights take 2 instructions, FP8 4, and one for each
// token. More tokens, and F32: matmul_blocked.h with tiles of 4 rows x 3 tokens, 12 accumulators of
// 8 floats.
#include <immintrin.h>

#include "ops/cpu/decode_portable.h"

#define DSFP4_LANES 8
#define DSFP4_ROWS 4
#define DSFP4_TOKENS 3
#define DSFP4_CHUNK 256
#define DSFP4_GROUPS 4

namespace dsfp4::ops::cpu {
namespace {

// NOLINTBEGIN(readability-identifier-naming): functions by another name
constexpr auto decode_nvfp4 = portable_nvfp4;
constexpr auto decode_mxfp4 = portable_mxfp4;
// NOLINTEND(readability-identifier-naming)

inline __m256 bf16_lanes(const std::uint8_t* codes) {
  const __m128i code = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(code), 16));
}

// Exponent and mantissa moved to their places in a float are the value times 2^-120, subnormals
// included; 0x7f is NaN.
inline __m256 e4m3_bits(const std::uint8_t* codes) {
  const __m256i kept = _mm256_set1_epi32(static_cast<int>(0x87f00000u));
  const __m128i code = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  return _mm256_castsi256_ps(
      _mm256_and_si256(_mm256_slli_epi32(_mm256_cvtepi8_epi32(code), 20), kept));
}

inline __m256 e4m3_lanes(const std::uint8_t* codes) {
  const __m256 bits = e4m3_bits(codes);
  const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x07f00000));
  const __m256i bad =
      _mm256_cmpeq_epi32(_mm256_castps_si256(_mm256_and_ps(bits, nan)), _mm256_castps_si256(nan));
  return _mm256_or_ps(_mm256_mul_ps(bits, _mm256_set1_ps(0x1p120f)), _mm256_castsi256_ps(bad));
}

void decode_bf16(const std::uint8_t* codes, std::int64_t n, float* out) {
  std::int64_t i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, bf16_lanes(codes + 2 * i));
  portable_bf16(codes + 2 * i, n - i, out + i);
}

void decode_e4m3(const std::uint8_t* codes, std::int64_t n, float scale, float* out) {
  const __m256 factor = _mm256_set1_ps(scale);
  std::int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_mul_ps(e4m3_lanes(codes + i), factor));
  }
  portable_e4m3(codes + i, n - i, scale, out + i);
}

}  // namespace
}  // namespace dsfp4::ops::cpu

#include "ops/cpu/matmul_f32_impl.h"

namespace dsfp4::ops::cpu {
namespace {

constexpr std::int64_t kTile = format::kFp8Tile;  // columns under one multiplier

inline void prefetch_tile(const std::uint8_t* from, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += 64) prefetch(from + i);
}

struct Bf16Row {
  Bf16Row(const format::WeightView& w, std::int64_t row)
      : data(reinterpret_cast<const std::uint8_t*>(w.data) + 2 * row * w.cols) {}
  static bool can(const format::WeightView&, std::int64_t, std::int64_t) { return true; }
  void begin_tile(std::int64_t tile, std::int64_t) {
    prefetch_tile(data + 2 * (tile + 8) * kTile, 2 * kTile);
  }
  __m256 lanes(std::int64_t column) const { return bf16_lanes(data + 2 * column); }
  void tail(std::int64_t column, std::int64_t n, float* out) const {
    decode_bf16(data + 2 * column, n, out);
  }
  const std::uint8_t* data;
};

// A weight is multiplied once, with 2^120 times its tile's multiplier; and NaN is looked for beside
// the decoding, 32 codes at a time.
struct Fp8Row {
  Fp8Row(const format::WeightView& w, std::int64_t row)
      : data(reinterpret_cast<const std::uint8_t*>(w.data) + row * w.cols),
        scales(scales_of(w, row)) {}
  static const std::uint8_t* scales_of(const format::WeightView& w, std::int64_t row) {
    return reinterpret_cast<const std::uint8_t*>(w.scales) + 4 * (row / kTile) * tiles_of(w);
  }
  static std::int64_t tiles_of(const format::WeightView& w) { return (w.cols + kTile - 1) / kTile; }
  // Whether 2^120 times each multiplier of the rows is a number; those of sound models are.
  static bool can(const format::WeightView& w, std::int64_t row_begin, std::int64_t row_end) {
    for (std::int64_t row = row_begin / kTile * kTile; row < row_end; row += kTile) {
      const std::uint8_t* const scales = scales_of(w, row);
      for (std::int64_t tile = 0; tile < tiles_of(w); ++tile) {
        float scale;
        std::memcpy(&scale, scales + 4 * tile, sizeof(scale));
        if (!(scale < 128.0f && scale > -128.0f)) return false;
      }
    }
    return true;
  }
  void begin_tile(std::int64_t tile, std::int64_t n) {
    const std::uint8_t* const codes = data + tile * kTile;
    prefetch_tile(codes + 16 * kTile, kTile);
    std::memcpy(&scale, scales + 4 * tile, sizeof(scale));
    factor = _mm256_set1_ps(has_nan(codes, n) ? __builtin_nanf("") : scale * 0x1p120f);
  }
  static bool has_nan(const std::uint8_t* codes, std::int64_t n) {
    const __m256i nan = _mm256_set1_epi8(0x7f);
    __m256i found = _mm256_setzero_si256();
    std::int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
      const __m256i code = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
      found = _mm256_or_si256(found, _mm256_cmpeq_epi8(_mm256_and_si256(code, nan), nan));
    }
    bool any = _mm256_testz_si256(found, found) == 0;
    for (; i < n; ++i) any |= (codes[i] & 0x7f) == 0x7f;
    return any;
  }
  __m256 lanes(std::int64_t column) const {
    return _mm256_mul_ps(e4m3_bits(data + column), factor);
  }
  void tail(std::int64_t column, std::int64_t n, float* out) const {
    decode_e4m3(data + column, n, scale, out);
  }
  const std::uint8_t* data;
  const std::uint8_t* scales;
  float scale = 0.0f;
  __m256 factor = _mm256_setzero_ps();
};

// Few tokens: decoded in registers, next to the multiply; the same sums as F32's.
template <class Row, int count>
void multiply_direct(const Product& p) {
  constexpr int kRows = count <= 3 ? 4 : 2;
  const std::int64_t cols = p.weight->cols;
  const std::int64_t whole = cols / kPad * kPad;
  const float* x[count];
  for (int t = 0; t < count; ++t) x[t] = reinterpret_cast<const float*>(x_row(p, t));
  for (std::int64_t row = p.row_begin; row < p.row_end; row += kRows) {
    const auto number = [&](int r) { return lesser(row + r, p.row_end - 1); };
    Row rows[4] = {{*p.weight, number(0)},
                   {*p.weight, number(1)},
                   {*p.weight, number(2)},
                   {*p.weight, number(3)}};
    __m256 sum[count][kRows];
    for (auto& of_token : sum) {
      for (__m256& s : of_token) s = _mm256_setzero_ps();
    }
    const auto add = [&](int r, __m256 w, std::int64_t column) __attribute__((always_inline)) {
      for (int t = 0; t < count; ++t) {
        sum[t][r] = _mm256_fmadd_ps(w, _mm256_load_ps(x[t] + column), sum[t][r]);
      }
    };
    for (std::int64_t begin = 0; begin < cols; begin += kTile) {
      const std::int64_t end = lesser(begin + kTile, whole);
      for (int r = 0; r < kRows; ++r) rows[r].begin_tile(begin / kTile, end - begin);
      for (std::int64_t c = begin; c < end; c += 8) {
        for (int r = 0; r < kRows; ++r) add(r, rows[r].lanes(c), c);
      }
    }
    if (whole < cols) {  // padded, as activations are
      for (int r = 0; r < kRows; ++r) {
        alignas(32) float tail[kPad] = {};
        rows[r].tail(whole, cols - whole, tail);
        for (std::int64_t i = 0; i < kPad; i += 8) add(r, _mm256_load_ps(tail + i), whole + i);
      }
    }
    for (int t = 0; t < count; ++t) {
      for (int r = 0; r < kRows && row + r < p.row_end; ++r) {
        y_row(p, t)[row + r - p.row_begin] = F32::total(reinterpret_cast<F32::Sum>(sum[t][r]));
      }
    }
  }
}

// The rows and tokens of `p` from the given ones on.
Product part_of(const Product& p, std::int64_t row, std::int64_t rows, std::int64_t token,
                std::int64_t tokens) {
  Product part = p;
  part.row_begin = row;
  part.row_end = row + rows;
  part.y += row - p.row_begin;
  part.tokens = tokens;
  if (p.x_index != nullptr) {
    part.x_index += token;
  } else {
    part.x += static_cast<std::size_t>(token) * p.x_stride;
  }
  if (p.y_index != nullptr) {
    part.y_index += token;
  } else {
    part.y += token * p.y_stride;
  }
  return part;
}

// Up to kFew tokens six at a time, with rows that stay in the second-level cache meanwhile:
// decoding a weight twice more in registers costs less than its way through scratch.
template <class Row>
void multiply_few_or_many(const Product& p, std::byte* scratch) {
  constexpr std::int64_t kFew = 18;
  constexpr std::int64_t kRowsInCache = 8;
  if (p.tokens > kFew || !Row::can(*p.weight, p.row_begin, p.row_end)) {
    return multiply_blocked<F32>(p, scratch);
  }
  for (std::int64_t row = p.row_begin; row < p.row_end; row += kRowsInCache) {
    for (std::int64_t token = 0; token < p.tokens; token += 6) {
      const Product part = part_of(p, row, lesser(kRowsInCache, p.row_end - row), token,
                                   lesser(6, p.tokens - token));
      for_few<6>(part.tokens, [&](auto count) { multiply_direct<Row, count>(part); });
    }
  }
}

void multiply(const Product& p, std::byte* scratch) {
  switch (p.weight->format) {
    case format::WeightFormat::kBF16:
      return multiply_few_or_many<Bf16Row>(p, scratch);
    case format::WeightFormat::kFp8Block:
      return multiply_few_or_many<Fp8Row>(p, scratch);
    default:
      return multiply_blocked<F32>(p, scratch);
  }
}

}  // namespace

const Matmul kMatmulF32Avx2 = {"f32_avx2",       0,        sizeof(BlockedScratch<F32>),
                               packed_f32_bytes, pack_f32, multiply};
}  // namespace dsfp4::ops::cpu
