// The inner loops of the CPU backend, one table of functions for each instruction set.
#pragma once

#include <cstdint>

#include "format/weight.h"

namespace dsfp4::ops::cpu {

struct Kernels {
  const char* isa;  // "baseline", "avx2", "avx512"

  /// Decodes one row into out[cols]. NVFP4's global scale is left out: global_scale() below.
  void (*decode_row)(const format::WeightView& weight, std::int64_t row, float* out);
  /// y[t * y_stride] = scale * sum over i < n of w[i] * x[t * x_stride + i], for t < tokens.
  /// The order of the sum depends on n alone.
  void (*dot_tokens)(const float* w, std::int64_t n, const float* x, std::int64_t x_stride,
                     std::int64_t tokens, float scale, float* y, std::int64_t y_stride);
  /// y += a * x.
  void (*axpy)(float a, const float* x, float* y, std::int64_t n);
  void (*bf16_to_float)(const std::uint16_t* x, float* y, std::int64_t n);
  /// y = E4M3 value of x * scale.
  void (*e4m3_to_float)(const std::uint8_t* x, float scale, float* y, std::int64_t n);
  /// y = x rounded to BF16 (to nearest even), kept as FP32. x and y may be the same.
  void (*round_to_bf16)(const float* x, float* y, std::int64_t n);
};

/// What decode_row left out.
inline float global_scale(const format::WeightView& weight) {
  return weight.format == format::WeightFormat::kNvfp4 ? weight.global_scale : 1.0f;
}

extern const Kernels kBaselineKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

}  // namespace dsfp4::ops::cpu
