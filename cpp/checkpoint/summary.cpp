#include "checkpoint/summary.h"

namespace dsfp4::checkpoint {
namespace {

void add_format(RoleSummary& role, format::WeightFormat format) {
  ++role.formats[std::string(format::weight_format_name(format))];
}

// Returns the bytes in the files, NVFP4's global scale included.
std::uint64_t add_matrix(RoleSummary& role, const WeightSource& source) {
  if (!source.present()) return 0;
  add_format(role, source.format);
  return source.bytes() + (source.global_scale == nullptr ? 0 : source.global_scale->bytes);
}

std::uint64_t add_mlp(RoleSummary& role, const MlpSource& mlp) {
  return add_matrix(role, mlp.gate_proj) + add_matrix(role, mlp.up_proj) +
         add_matrix(role, mlp.down_proj);
}

void add_whole(RoleSummary& role, std::uint64_t bytes) {
  role.bytes += bytes;
  role.bytes_per_token += bytes;
}

void add_norm(RoleSummary& norms, const TensorInfo* norm) {
  if (norm == nullptr) return;
  add_format(norms, norm->dtype == format::DType::kF32 ? format::WeightFormat::kF32
                                                       : format::WeightFormat::kBF16);
  add_whole(norms, norm->bytes);
}

struct Roles {
  RoleSummary routed_experts{"routed experts", {}, 0, 0};
  RoleSummary shared_experts{"shared experts", {}, 0, 0};
  RoleSummary dense_mlp{"dense MLP", {}, 0, 0};
  RoleSummary attention{"attention", {}, 0, 0};
  RoleSummary router{"router", {}, 0, 0};
  RoleSummary embedding{"embedding", {}, 0, 0};
  RoleSummary head{"head", {}, 0, 0};
  RoleSummary norms{"norms", {}, 0, 0};
};

void add_attention(Roles& roles, const AttentionSource& source) {
  for (const WeightSource* matrix :
       {&source.q_proj, &source.q_a_proj, &source.q_b_proj, &source.kv_a_proj_with_mqa,
        &source.kv_b_proj, &source.o_proj}) {
    add_whole(roles.attention, add_matrix(roles.attention, *matrix));
  }
  add_norm(roles.norms, source.q_a_layernorm);
  add_norm(roles.norms, source.kv_a_layernorm);
}

void add_layer(Roles& roles, const LayerSource& layer, const ModelConfig& config) {
  add_norm(roles.norms, layer.input_layernorm);
  add_norm(roles.norms, layer.post_attention_layernorm);
  add_attention(roles, layer.self_attn);
  add_whole(roles.dense_mlp, add_mlp(roles.dense_mlp, layer.mlp));
  add_whole(roles.router, add_matrix(roles.router, layer.gate));
  if (layer.e_score_correction_bias != nullptr) {
    add_whole(roles.router, layer.e_score_correction_bias->bytes);
  }
  add_whole(roles.shared_experts, add_mlp(roles.shared_experts, layer.shared_experts));
  if (layer.experts.empty()) return;
  std::uint64_t bytes = 0;
  for (const MlpSource& expert : layer.experts) bytes += add_mlp(roles.routed_experts, expert);
  roles.routed_experts.bytes += bytes;
  // bytes * active / experts without an overflow on the way.
  const auto active = static_cast<std::uint64_t>(config.num_experts_per_tok);
  const std::uint64_t experts = layer.experts.size();
  roles.routed_experts.bytes_per_token +=
      bytes / experts * active + bytes % experts * active / experts;
}

}  // namespace

Summary summarize(const Catalogue& catalogue, const ModelConfig& config,
                  const ModelLayout& layout) {
  Roles roles;
  for (const LayerSource& layer : layout.layers) add_layer(roles, layer, config);
  add_norm(roles.norms, layout.norm);
  roles.embedding.bytes = add_matrix(roles.embedding, layout.embed_tokens);
  roles.embedding.bytes_per_token =
      roles.embedding.bytes / static_cast<std::uint64_t>(config.vocab_size);
  roles.head.bytes_per_token = add_matrix(roles.head, layout.lm_head);
  if (layout.lm_head.data != layout.embed_tokens.data) {
    roles.head.bytes = roles.head.bytes_per_token;
  }

  Summary summary;
  for (RoleSummary* role :
       {&roles.routed_experts, &roles.shared_experts, &roles.dense_mlp, &roles.attention,
        &roles.router, &roles.embedding, &roles.head, &roles.norms}) {
    if (role->formats.empty()) continue;
    summary.total_bytes += role->bytes;
    summary.bytes_per_token += role->bytes_per_token;
    summary.roles.push_back(std::move(*role));
  }
  std::uint64_t all_bytes = 0;
  for (const TensorInfo& tensor : catalogue.tensors()) all_bytes += tensor.bytes;
  summary.unused_bytes = all_bytes - summary.total_bytes;
  summary.tensors = catalogue.tensors().size();
  summary.files = catalogue.files().size();
  return summary;
}

}  // namespace dsfp4::checkpoint
