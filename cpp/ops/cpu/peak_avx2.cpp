#include <immintrin.h>

#include "ops/cpu/peak.h"

namespace dsfp4::ops::cpu {

double multiply_int16_avx2(std::int64_t steps, float* sink) {
  constexpr int kChains = 12;
  __m256i sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = _mm256_set1_epi32(i + static_cast<int>(*sink));
  const __m256i b = _mm256_set1_epi16(3);
  for (std::int64_t step = 0; step < steps; ++step) {
    for (__m256i& sum : sums) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(sum, b));
  }
  __m256i total = sums[0];
  for (int i = 1; i < kChains; ++i) total = _mm256_xor_si256(total, sums[i]);
  *sink = static_cast<float>(_mm256_extract_epi32(total, 0) & 1);
  return 2.0 * kChains * 16.0 * static_cast<double>(steps);
}

}  // namespace dsfp4::ops::cpu
