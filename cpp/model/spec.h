// What the layers need to know of a checkpoint's configuration, in the terms of the ops.
#pragma once

#include <cstdint>
#include <vector>

#include "checkpoint/config.h"
#include "ops/views.h"

namespace dsfp4::model {

/// Rotary embedding: the angle of pair i at position p is p * inverse_frequency[i].
struct RopeSpec {
  std::vector<double> inverse_frequency;  // qk_rope_head_dim / 2
  double amplitude = 1.0;                 // multiplies cos and sin
};

struct ModelSpec {
  std::int64_t vocab_size = 0;
  std::int64_t hidden_size = 0;
  std::int64_t layers = 0;
  std::int64_t dense_layers = 0;  // the first ones
  std::int64_t q_lora_rank = 0;   // 0: a plain q_proj
  std::int64_t intermediate_size = 0;
  std::int64_t moe_intermediate_size = 0;
  std::int64_t shared_intermediate_size = 0;  // 0: no shared experts
  float rms_norm_eps = 1e-6f;
  ops::MlaShape mla;
  RopeSpec rope;
  ops::RouterSpec router;  // router.experts == 0: no MoE layers

  std::int64_t moe_layers() const { return router.experts == 0 ? 0 : layers - dense_layers; }
  bool is_moe(std::int64_t layer) const { return router.experts > 0 && layer >= dense_layers; }
};

/// DeepSeek applies these norms with an epsilon of its own, whatever rms_norm_eps says.
inline constexpr float kLoraNormEps = 1e-6f;

/// Throws UnsupportedError for a model type or a routing method that no family here has.
ModelSpec make_spec(const checkpoint::ModelConfig& config);

// One a family: how it chooses experts.
ops::RouterSpec deepseek_v2_router(const checkpoint::ModelConfig& config);
ops::RouterSpec deepseek_v3_router(const checkpoint::ModelConfig& config);

}  // namespace dsfp4::model
