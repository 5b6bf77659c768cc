// The CPU backend: weights decoded next to the multiply, activations rounded to BF16, FP32 sums.
#pragma once

#include <vector>

#include "ops/cpu/kernels.h"
#include "ops/cpu/layer_kernels.h"
#include "ops/host_ops.h"

namespace dsfp4::ops::cpu {

class CpuBackend final : public HostBackend {
 public:
  CpuBackend(int threads, const Kernels& kernels) : HostBackend(threads), kernels_(kernels) {}

  std::string_view name() const override { return "cpu"; }
  std::string_view isa() const override { return kernels_.isa; }
  KvFormat default_kv_format() const override { return KvFormat::kBf16; }

  void rms_norm(ConstMatrix x, std::span<const float> weight, float eps, Matrix y) override;
  void linear(const format::WeightView& weight, ConstMatrix x, Matrix y, Inputs inputs) override;
  void silu_mul(Matrix gate, ConstMatrix up) override;
  void add(ConstMatrix x, Matrix y) override;
  void combine(ConstMatrix pairs, std::span<const float> weights, std::int64_t top_k,
               Matrix y) override;

  void prefill_attention(const MlaShape& shape, const format::WeightView& kv_b_proj,
                         std::span<const SequenceRows> batch, ConstMatrix q, Matrix out) override;
  void absorb_query(const MlaShape& shape, const format::WeightView& kv_b_proj, ConstMatrix q,
                    Matrix q_abs) override;
  void latent_attention(const MlaShape& shape, std::span<const SequenceRows> batch,
                        ConstMatrix q_abs, ConstMatrix q, Matrix out) override;
  void expand_value(const MlaShape& shape, const format::WeightView& kv_b_proj,
                    ConstMatrix attended, Matrix out) override;

  void experts(std::span<const ExpertTask> tasks, std::int64_t top_k, ConstMatrix x, Matrix hidden,
               Matrix out) override;

 private:
  /// A copy of x with every value rounded to BF16, in `buffer`.
  ConstMatrix rounded(ConstMatrix x, std::vector<float>& buffer);

  const Kernels& kernels_;
  const LayerKernels& layer_ = layer_kernels_for(kernels_.isa);
  std::vector<float> inputs_;  // rounded activations of the op that is running
};

/// Scratch of the calling thread, at least `count` floats; kept from call to call.
/// `slot` 0..2 are independent buffers.
float* thread_scratch(int slot, std::int64_t count);

}  // namespace dsfp4::ops::cpu
