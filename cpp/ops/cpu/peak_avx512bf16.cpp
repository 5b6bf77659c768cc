#include <immintrin.h>

#include "ops/cpu/peak.h"

namespace dsfp4::ops::cpu {

double multiply_bf16_avx512(std::int64_t steps, float* sink) {
  constexpr int kChains = 16;
  __m512 sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = _mm512_set1_ps(static_cast<float>(i));
  const __m512 values = _mm512_set1_ps(*sink + 0.5f);
  const __m512bh a = _mm512_cvtne2ps_pbh(values, values);
  for (std::int64_t step = 0; step < steps; ++step) {
    for (__m512& sum : sums) sum = _mm512_dpbf16_ps(sum, a, a);
  }
  __m512 total = sums[0];
  for (int i = 1; i < kChains; ++i) total = _mm512_add_ps(total, sums[i]);
  *sink = _mm512_cvtss_f32(total) > 0.0f ? 0.25f : 0.0f;
  return 2.0 * kChains * 32.0 * static_cast<double>(steps);
}

}  // namespace dsfp4::ops::cpu
