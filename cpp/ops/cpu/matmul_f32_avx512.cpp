// FP32 products with AVX-512 F, BW, DQ and VL, for CPUs without BF16 products and for activations
// that must not be rounded: NVFP4 (0.5625 bytes a weight), MXFP4 (0.53), FP8 (1), BF16 (2), F32
// (4). An E2M1 code is an index into a register of 16 floats. Tile: 4 rows x 6 tokens, 24
// accumulators of 16 floats.
#include <immintrin.h>

#include "ops/cpu/decode_portable.h"

#define DSFP4_LANES 16
#define DSFP4_ROWS 4
#define DSFP4_TOKENS 6
#define DSFP4_CHUNK 1024
#define DSFP4_GROUPS 1

namespace dsfp4::ops::cpu {
namespace {

void decode_bf16(const std::uint8_t* codes, std::int64_t n, float* out) {
  std::int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256i code = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 2 * i));
    const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(code), 16);
    _mm512_storeu_ps(out + i, _mm512_castsi512_ps(bits));
  }
  portable_bf16(codes + 2 * i, n - i, out + i);
}

// As in matmul_f32_avx2.cpp.
void decode_e4m3(const std::uint8_t* codes, std::int64_t n, float scale, float* out) {
  const __m512i kept = _mm512_set1_epi32(static_cast<int>(0x87f00000u));
  const __m512i nan = _mm512_set1_epi32(0x07f00000);
  const __m512 lift = _mm512_set1_ps(0x1p120f);
  const __m512 factor = _mm512_set1_ps(scale);
  std::int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m128i code = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
    const __m512i bits = _mm512_and_si512(_mm512_slli_epi32(_mm512_cvtepi8_epi32(code), 20), kept);
    const __mmask16 bad = _mm512_cmpeq_epi32_mask(_mm512_and_si512(bits, nan), nan);
    const __m512 value = _mm512_mul_ps(_mm512_castsi512_ps(bits), lift);
    const __m512 marked = _mm512_mask_mov_ps(value, bad, _mm512_set1_ps(__builtin_nanf("")));
    _mm512_storeu_ps(out + i, _mm512_mul_ps(marked, factor));
  }
  portable_e4m3(codes + i, n - i, scale, out + i);
}

// 16 columns: 8 bytes become 16 bytes with a code each, then 16 indices.
inline __m512 e2m1_values(const std::uint8_t* packed) {
  const __m512 table = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f,
                                      -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
  const __m128i pairs =
      _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
  const __m128i codes = _mm_or_si128(pairs, _mm_slli_epi16(pairs, 4));
  return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), table);  // reads 4 bits of an index
}

void decode_nvfp4(const std::uint8_t* packed, const std::uint8_t* scales, std::int64_t n,
                  float* out) {
  for (std::int64_t i = 0; i < n; i += 16) {
    const __m512 scale = _mm512_set1_ps(kPortableE4m3.value[scales[i / 16]]);
    _mm512_storeu_ps(out + i, _mm512_mul_ps(e2m1_values(packed + i / 2), scale));
  }
}

void decode_mxfp4(const std::uint8_t* packed, const std::uint8_t* scales, std::int64_t n,
                  float* out) {
  for (std::int64_t i = 0; i < n; i += 32) {
    const __m512 scale = _mm512_set1_ps(portable_e8m0(scales[i / 32]));
    _mm512_storeu_ps(out + i, _mm512_mul_ps(e2m1_values(packed + i / 2), scale));
    _mm512_storeu_ps(out + i + 16, _mm512_mul_ps(e2m1_values(packed + i / 2 + 8), scale));
  }
}

}  // namespace
}  // namespace dsfp4::ops::cpu

#include "ops/cpu/matmul_f32_impl.h"

namespace dsfp4::ops::cpu {
const Matmul kMatmulF32Avx512 = {"f32_avx512",     0,        sizeof(BlockedScratch<F32>),
                                 packed_f32_bytes, pack_f32, multiply_blocked<F32>};
}  // namespace dsfp4::ops::cpu
