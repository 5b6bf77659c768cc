// The inner loops of everything in a layer but the products with large weights: attention, norms
// and activations. One table of functions for each instruction set.
#pragma once

#include <cstdint>
#include <string_view>

namespace dsfp4::ops::cpu {

/// The two factors of a small matrix product C [m, n] (+)= A [m, k] B [k, n], all FP32.
/// A's element (i, j) is a[i * a_row + j * a_col]; one of the two strides is 1. B comes in panels
/// of LayerKernels::panel columns: panel p starts at b + p * b_panel and its rows are b_row apart.
/// Columns are computed in whole registers: B is readable and C writable up to n rounded up to a
/// multiple of LayerKernels::lanes; what stands there does not matter.
struct SmallProduct {
  const float* a;
  std::int64_t a_row, a_col;
  const float* b;
  std::int64_t b_row, b_panel;
  float* c;
  std::int64_t c_row;
  std::int64_t m, n, k;
};

/// One step of an online softmax over `keys` keys for `lanes` queries side by side.
/// scores [keys, stride]: dot products in, exp(score * scale - new maximum) out, 0 where masked.
/// Query i sees the keys below visible[i] (null: all). maximum and sum [lanes] carry over from step
/// to step (-infinity and 0 at first); rescale [lanes] is what earlier sums have to be multiplied
/// with. A query that has seen no key in any step, this one included, gets NaN. `lanes` is a
/// multiple of LayerKernels::lanes. Each lane's sum runs over the keys in order.
struct SoftmaxStep {
  float* scores;
  std::int64_t stride;
  std::int64_t keys, lanes;
  float scale;
  const std::int32_t* visible;
  float* maximum;
  float* sum;
  float* rescale;
};

struct LayerKernels {
  std::string_view isa;  // "baseline", "avx2", "avx512"
  std::int64_t lanes;    // floats in a register
  std::int64_t panel;    // columns of a panel, a multiple of lanes

  /// Each element of C is summed over k in order, from 0 or (add) from what C holds.
  void (*multiply)(const SmallProduct& product);
  void (*multiply_add)(const SmallProduct& product);
  void (*softmax_step)(const SoftmaxStep& step);
  /// y[i * y_stride] = scale * sum over j < k of w[j] * x[i * x_stride + j] for i < rows. The order
  /// of the sum depends on k alone.
  void (*dot)(const float* w, std::int64_t k, const float* x, std::int64_t x_stride,
              std::int64_t rows, float scale, float* y, std::int64_t y_stride);

  void (*bf16_to_float)(const std::uint16_t* x, float* y, std::int64_t n);
  /// y = E4M3 value of x * scale.
  void (*e4m3_to_float)(const std::uint8_t* x, float scale, float* y, std::int64_t n);

  /// y = x * scale, y += x, y += a * x.
  void (*scale)(const float* x, float scale, float* y, std::int64_t n);
  void (*add)(const float* x, float* y, std::int64_t n);
  void (*add_scaled)(float a, const float* x, float* y, std::int64_t n);
  /// y = x * scale * weight, for RMS norms.
  void (*scale_by)(const float* x, float scale, const float* weight, float* y, std::int64_t n);
  /// gate = gate / (1 + exp(-gate)) * up. Each element's value depends on nothing else.
  void (*silu_mul)(float* gate, const float* up, std::int64_t n);

  /// Does nothing but FP32 multiply-adds in registers, `steps` rounds of them, for measuring
  /// what the processor can do at most. Returns the operations done (two a multiply-add); `sink`
  /// gets a value that depends on all of them.
  double (*multiply_in_registers)(std::int64_t steps, float* sink);
};

extern const LayerKernels kBaselineLayerKernels;
extern const LayerKernels kAvx2LayerKernels;
extern const LayerKernels kAvx512LayerKernels;

/// The table that belongs to the instruction set of a Kernels table: the widest that it implies.
const LayerKernels& layer_kernels_for(std::string_view isa);

}  // namespace dsfp4::ops::cpu
