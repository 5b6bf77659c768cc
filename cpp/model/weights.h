// The weights of a model as the layers see them: views in stored formats, norms as FP32 vectors.
#pragma once

#include <vector>

#include "ops/views.h"

namespace dsfp4::model {

using ops::WeightView;
using NormWeight = DeviceSpan<const float>;

/// gate, up and down projection: an expert, the shared experts or a dense layer's MLP.
using MlpWeights = ops::ExpertView;

struct AttentionWeights {
  WeightView q_proj;  // without q_lora_rank
  WeightView q_a_proj, q_b_proj;
  NormWeight q_a_layernorm;
  WeightView kv_a_proj_with_mqa, kv_b_proj, o_proj;
  NormWeight kv_a_layernorm;
  float k_scale = 1.0f;  // of an FP8 KV cache
};

struct LayerWeights {
  NormWeight input_layernorm, post_attention_layernorm;
  AttentionWeights self_attn;
  MlpWeights mlp;  // dense layers
  // MoE layers:
  WeightView gate;
  DeviceSpan<const float> e_score_correction_bias;
  std::vector<MlpWeights> experts;
  MlpWeights shared_experts;
};

struct ModelWeights {
  WeightView embed_tokens, lm_head;
  NormWeight norm;
  std::vector<LayerWeights> layers;
};

}  // namespace dsfp4::model
