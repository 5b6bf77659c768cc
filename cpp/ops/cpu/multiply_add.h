// a * b + c for vectors, in one rounding where the instruction set has it. Written as a * b + c the
// compiler would fuse it in one instance of a template and not in another, as it sees fit, and a
// token's bits would depend on its company. For the kernel files, which say DSFP4_LANES first.
#if defined(__FMA__)
#include <immintrin.h>
#endif

namespace dsfp4::ops::cpu {
namespace {

template <typename Vec>
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__) && DSFP4_LANES == 16
  return reinterpret_cast<Vec>(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__FMA__) && DSFP4_LANES == 8
  return reinterpret_cast<Vec>(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#elif defined(__FMA__)  // a test's emulation of wider registers
  for (int i = 0; i < DSFP4_LANES; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

}  // namespace
}  // namespace dsfp4::ops::cpu
