// FP32 products with AVX2 and FMA: FP8 (1 byte a weight, a multiplier for 128 columns), BF16 (2)
// and F32 (4) weights; FP4 has integers of its own (matmul_fp4_avx2.cpp) and comes here only with
// activations that must not be rounded. Tile: 4 rows x 2 tokens, 8 accumulators of 8 floats.
#include <immintrin.h>

#include "ops/cpu/decode_portable.h"

#define DSFP4_LANES 8
#define DSFP4_ROWS 4
#define DSFP4_TOKENS 2

namespace dsfp4::ops::cpu {
namespace {

// NOLINTBEGIN(readability-identifier-naming): functions by another name
constexpr auto decode_nvfp4 = portable_nvfp4;
constexpr auto decode_mxfp4 = portable_mxfp4;
// NOLINTEND(readability-identifier-naming)

void decode_bf16(const std::uint8_t* codes, std::int64_t n, float* out) {
  std::int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i code = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 2 * i));
    const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(code), 16);
    _mm256_storeu_ps(out + i, _mm256_castsi256_ps(bits));
  }
  portable_bf16(codes + 2 * i, n - i, out + i);
}

// Exponent and mantissa moved to their places in a float are the value times 2^-120, subnormals
// included; 0x7f is NaN.
void decode_e4m3(const std::uint8_t* codes, std::int64_t n, float scale, float* out) {
  const __m256i kept = _mm256_set1_epi32(static_cast<int>(0x87f00000u));
  const __m256i nan = _mm256_set1_epi32(0x07f00000);
  const __m256 lift = _mm256_set1_ps(0x1p120f);
  const __m256 factor = _mm256_set1_ps(scale);
  std::int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i code = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i));
    const __m256i bits = _mm256_and_si256(_mm256_slli_epi32(_mm256_cvtepi8_epi32(code), 20), kept);
    const __m256i bad = _mm256_cmpeq_epi32(_mm256_and_si256(bits, nan), nan);
    const __m256 value = _mm256_mul_ps(_mm256_castsi256_ps(bits), lift);
    const __m256 marked = _mm256_or_ps(value, _mm256_castsi256_ps(bad));
    _mm256_storeu_ps(out + i, _mm256_mul_ps(marked, factor));
  }
  portable_e4m3(codes + i, n - i, scale, out + i);
}

}  // namespace
}  // namespace dsfp4::ops::cpu

#include "ops/cpu/matmul_f32_impl.h"

namespace dsfp4::ops::cpu {
const Matmul kMatmulF32Avx2 = {
    "f32_avx2",           0, kPad, sizeof(BlockedScratch<F32>), packed_f32_bytes, pack_f32,
    multiply_blocked<F32>};
}  // namespace dsfp4::ops::cpu
