// The inner loops of the CPU backend, one table of functions for each instruction set.
#pragma once

#include <cstdint>

#include "format/weight.h"

namespace dsfp4::ops::cpu {

struct Kernels {
  const char* isa;  // "baseline", "avx2", "avx512"

  /// Decodes one row into out[cols]. NVFP4's global scale is left out: global_scale() below.
  void (*decode_row)(const format::WeightView& weight, std::int64_t row, float* out);
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
