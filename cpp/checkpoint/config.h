// config.json of the DeepSeek families, validated. Field names are Hugging Face's.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace dsfp4::checkpoint {

enum class Scoring : std::uint8_t { kSoftmax, kSigmoid };
enum class TopkMethod : std::uint8_t { kGreedy, kGroupLimitedGreedy, kNoauxTc };

/// Hugging Face's spelling: "softmax", "noaux_tc", ...
std::string_view scoring_name(Scoring scoring);
std::string_view topk_method_name(TopkMethod method);

/// The largest config.json, generation_config.json and hf_quant_config.json that are read: real
/// ones have some kB, and one that listed R1's 46,000 expert matrices one by one would have 5 MB.
inline constexpr std::uint64_t kMaxConfigBytes = std::uint64_t{16} << 20;

/// YaRN's growth of attention's temperature: 1 for a `factor` of up to 1.
double yarn_mscale(double factor, double mscale);

/// Present when the checkpoint scales its rotary frequencies with YaRN.
struct YarnConfig {
  double factor = 1.0;
  double beta_fast = 32.0;
  double beta_slow = 1.0;
  double mscale = 0.0;          // 0: not given
  double mscale_all_dim = 0.0;  // 0: not given
  std::int64_t original_max_position_embeddings = 0;

  /// The factor on cosines and sines, from `factor`, `mscale` and `mscale_all_dim`.
  double amplitude() const;
};

struct ModelConfig {
  std::string model_type;  // "deepseek_v2" or "deepseek_v3"
  std::int64_t vocab_size = 0;
  std::int64_t hidden_size = 0;
  std::int64_t num_hidden_layers = 0;
  std::int64_t first_k_dense_replace = 0;
  std::int64_t num_attention_heads = 0;
  std::int64_t q_lora_rank = 0;  // 0: a plain q_proj
  std::int64_t kv_lora_rank = 0;
  std::int64_t qk_nope_head_dim = 0;
  std::int64_t qk_rope_head_dim = 0;
  std::int64_t v_head_dim = 0;
  std::int64_t intermediate_size = 0;
  std::int64_t moe_intermediate_size = 0;
  std::int64_t n_routed_experts = 0;  // 0: no MoE layers at all
  std::int64_t n_shared_experts = 0;
  std::int64_t num_experts_per_tok = 0;
  std::int64_t n_group = 1;
  std::int64_t topk_group = 1;
  Scoring scoring_func = Scoring::kSoftmax;
  TopkMethod topk_method = TopkMethod::kGreedy;
  bool norm_topk_prob = false;
  double routed_scaling_factor = 1.0;
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000.0;
  std::optional<YarnConfig> yarn;
  std::int64_t max_position_embeddings = 0;
  bool tie_word_embeddings = false;
  std::optional<std::int64_t> bos_token_id;
  std::vector<std::int64_t> eos_token_ids;  // generation_config.json's list where there is one

  std::int64_t moe_layers() const {
    return n_routed_experts == 0 ? 0 : num_hidden_layers - first_k_dense_replace;
  }
  bool is_moe_layer(std::int64_t layer) const {
    return n_routed_experts > 0 && layer >= first_k_dense_replace;
  }
};

/// Reads config.json (and generation_config.json for end tokens) of a checkpoint folder.
/// Throws CheckpointError naming the field for a missing, mistyped or out-of-range value, and
/// UnsupportedError naming model_type (or the field) for what this version does not run.
ModelConfig read_config(const std::filesystem::path& folder);

}  // namespace dsfp4::checkpoint
