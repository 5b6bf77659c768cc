#include "model/spec.h"

#include "dsfp4/error.h"
#include "model/rope.h"

namespace dsfp4::model {

ModelSpec make_spec(const checkpoint::ModelConfig& config) {
  ModelSpec spec;
  spec.vocab_size = config.vocab_size;
  spec.hidden_size = config.hidden_size;
  spec.layers = config.num_hidden_layers;
  spec.dense_layers =
      config.n_routed_experts == 0 ? config.num_hidden_layers : config.first_k_dense_replace;
  spec.q_lora_rank = config.q_lora_rank;
  spec.intermediate_size = config.intermediate_size;
  spec.moe_intermediate_size = config.moe_intermediate_size;
  spec.shared_intermediate_size = config.n_shared_experts * config.moe_intermediate_size;
  spec.rms_norm_eps = static_cast<float>(config.rms_norm_eps);
  spec.mla = {config.num_attention_heads, config.kv_lora_rank, config.qk_nope_head_dim,
              config.qk_rope_head_dim,    config.v_head_dim,   softmax_scale(config)};
  spec.rope = rope_spec(config);
  if (config.n_routed_experts > 0) {
    if (config.model_type == "deepseek_v2") {
      spec.router = deepseek_v2_router(config);
    } else if (config.model_type == "deepseek_v3") {
      spec.router = deepseek_v3_router(config);
    } else {
      throw UnsupportedError("model_type '" + config.model_type +
                             "' is not supported; deepseek_v2 and deepseek_v3 are");
    }
  }
  return spec;
}

}  // namespace dsfp4::model
