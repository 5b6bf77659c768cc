#include "checkpoint/layout.h"

#include "checkpoint/leftovers.h"

namespace dsfp4::checkpoint {
namespace {

const TensorInfo* resolve_vector(const Catalogue& catalogue, const std::string& name,
                                 std::int64_t length) {
  const TensorInfo& tensor = catalogue.require(name);
  check_tensor(catalogue, tensor, {format::DType::kBF16, format::DType::kF32}, {length});
  return &tensor;
}

MlpSource resolve_mlp(const Catalogue& catalogue, const std::string& prefix, std::int64_t hidden,
                      std::int64_t width) {
  return {resolve_weight(catalogue, prefix + ".gate_proj", width, hidden),
          resolve_weight(catalogue, prefix + ".up_proj", width, hidden),
          resolve_weight(catalogue, prefix + ".down_proj", hidden, width)};
}

AttentionSource resolve_attention(const Catalogue& catalogue, const std::string& prefix,
                                  const ModelConfig& config) {
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t heads = config.num_attention_heads;
  const std::int64_t q_rows = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim);
  AttentionSource source;
  if (config.q_lora_rank == 0) {
    source.q_proj = resolve_weight(catalogue, prefix + ".q_proj", q_rows, hidden);
  } else {
    source.q_a_proj = resolve_weight(catalogue, prefix + ".q_a_proj", config.q_lora_rank, hidden);
    source.q_a_layernorm =
        resolve_vector(catalogue, prefix + ".q_a_layernorm.weight", config.q_lora_rank);
    source.q_b_proj = resolve_weight(catalogue, prefix + ".q_b_proj", q_rows, config.q_lora_rank);
  }
  source.kv_a_proj_with_mqa = resolve_weight(catalogue, prefix + ".kv_a_proj_with_mqa",
                                             config.kv_lora_rank + config.qk_rope_head_dim, hidden);
  source.kv_a_layernorm =
      resolve_vector(catalogue, prefix + ".kv_a_layernorm.weight", config.kv_lora_rank);
  source.kv_b_proj =
      resolve_weight(catalogue, prefix + ".kv_b_proj",
                     heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank);
  source.o_proj = resolve_weight(catalogue, prefix + ".o_proj", hidden, heads * config.v_head_dim);
  const std::string k_scale = prefix + ".k_proj.k_scale";
  if (catalogue.find(k_scale) != nullptr || catalogue.in_absent_shard(k_scale)) {
    source.k_scale = resolve_scalar(catalogue, catalogue.require(k_scale));
  }
  return source;
}

void resolve_moe(const Catalogue& catalogue, const std::string& prefix, const ModelConfig& config,
                 LayerSource& layer) {
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t width = config.moe_intermediate_size;
  layer.gate = resolve_plain(catalogue, catalogue.require(prefix + ".gate.weight"),
                             config.n_routed_experts, hidden);
  if (config.topk_method == TopkMethod::kNoauxTc) {
    layer.e_score_correction_bias = resolve_vector(
        catalogue, prefix + ".gate.e_score_correction_bias", config.n_routed_experts);
  }
  layer.experts.reserve(static_cast<std::size_t>(config.n_routed_experts));
  for (std::int64_t expert = 0; expert < config.n_routed_experts; ++expert) {
    layer.experts.push_back(
        resolve_mlp(catalogue, prefix + ".experts." + std::to_string(expert), hidden, width));
  }
  if (config.n_shared_experts > 0) {
    layer.shared_experts =
        resolve_mlp(catalogue, prefix + ".shared_experts", hidden, width * config.n_shared_experts);
  }
}

LayerSource resolve_layer(const Catalogue& catalogue, std::int64_t index,
                          const ModelConfig& config) {
  const std::string prefix = "model.layers." + std::to_string(index);
  LayerSource layer;
  layer.input_layernorm =
      resolve_vector(catalogue, prefix + ".input_layernorm.weight", config.hidden_size);
  layer.post_attention_layernorm =
      resolve_vector(catalogue, prefix + ".post_attention_layernorm.weight", config.hidden_size);
  layer.self_attn = resolve_attention(catalogue, prefix + ".self_attn", config);
  if (config.is_moe_layer(index)) {
    resolve_moe(catalogue, prefix + ".mlp", config, layer);
  } else {
    layer.mlp =
        resolve_mlp(catalogue, prefix + ".mlp", config.hidden_size, config.intermediate_size);
  }
  return layer;
}

}  // namespace

ModelLayout resolve_layout(const Catalogue& catalogue, const ModelConfig& config) {
  ModelLayout layout;
  layout.embed_tokens = resolve_plain(catalogue, catalogue.require("model.embed_tokens.weight"),
                                      config.vocab_size, config.hidden_size);
  for (std::int64_t i = 0; i < config.num_hidden_layers; ++i) {
    layout.layers.push_back(resolve_layer(catalogue, i, config));
  }
  layout.norm = resolve_vector(catalogue, "model.norm.weight", config.hidden_size);
  layout.lm_head =
      config.tie_word_embeddings
          ? layout.embed_tokens
          : resolve_weight(catalogue, "lm_head", config.vocab_size, config.hidden_size);
  check_leftovers(catalogue, config, layout);
  return layout;
}

}  // namespace dsfp4::checkpoint
