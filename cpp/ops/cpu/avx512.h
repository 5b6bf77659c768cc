// Small parts of the AVX-512 files; internal linkage, like matmul_blocked.h.
#pragma once

#include <immintrin.h>

namespace dsfp4::ops::cpu {
namespace {

inline __m512i load_512(const void* from) { return _mm512_loadu_si512(from); }

inline float total_of(__m512 sum) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

}  // namespace
}  // namespace dsfp4::ops::cpu
