// Roles: which tensors make up layer 12's o_proj, or expert 7's up-projection and its scales.
// Formats are recognised from the tensors themselves; shapes are checked against the config.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "checkpoint/catalogue.h"
#include "checkpoint/config.h"
#include "checkpoint/weight_source.h"

namespace dsfp4::checkpoint {

struct MlpSource {
  WeightSource gate_proj, up_proj, down_proj;
};

struct AttentionSource {
  WeightSource q_proj;  // only where q_lora_rank is 0; else the two below
  WeightSource q_a_proj, q_b_proj;
  const TensorInfo* q_a_layernorm = nullptr;
  WeightSource kv_a_proj_with_mqa, kv_b_proj, o_proj;
  const TensorInfo* kv_a_layernorm = nullptr;
  const TensorInfo* k_scale = nullptr;  // of an FP8 KV cache; may be absent
};

struct LayerSource {
  const TensorInfo* input_layernorm = nullptr;
  const TensorInfo* post_attention_layernorm = nullptr;
  AttentionSource self_attn;
  MlpSource mlp;  // dense layers only
  // MoE layers only:
  WeightSource gate;                                    // [n_routed_experts, hidden], F32 or BF16
  const TensorInfo* e_score_correction_bias = nullptr;  // noaux_tc only, F32 (BF16 accepted)
  std::vector<MlpSource> experts;                       // n_routed_experts
  MlpSource shared_experts;                             // absent if n_shared_experts is 0
};

struct ModelLayout {
  WeightSource embed_tokens;  // F32 or BF16 [vocab, hidden]
  WeightSource lm_head;       // [vocab, hidden]; the embedding where tie_word_embeddings
  const TensorInfo* norm = nullptr;
  std::vector<LayerSource> layers;  // num_hidden_layers; MTP layers are not listed
};

/// All roles of the model. Throws CheckpointError for a missing tensor or a wrong shape or dtype,
/// UnsupportedError for a format that is not supported and for a tensor that the model does not use
/// though it may change what is computed (leftovers.h).
ModelLayout resolve_layout(const Catalogue& catalogue, const ModelConfig& config);

}  // namespace dsfp4::checkpoint
