#include "model/decoder.h"

#include <algorithm>

#include "ops/host_routing.h"
#include "ops/mlp.h"

namespace dsfp4::model {

void Decoder::head(ops::ConstMatrix hidden, ops::Matrix logits, Phase phase) const {
  ops_.linear(weights_.lm_head, hidden, logits, phase);
}

std::size_t scratch_bytes(const ModelSpec& spec, std::int64_t rows, Phase phase) {
  const std::size_t stream = 3 * ops::scratch_bytes(rows * spec.hidden_size) +
                             ops::scratch_bytes(rows * spec.mla.qk_rope_head_dim);
  const std::size_t attention = mla_scratch_bytes(spec, rows, phase);
  const std::size_t dense =
      std::max(attention, ops::mlp_scratch_bytes(spec.intermediate_size, rows));
  if (spec.moe_layers() == 0) return stream + dense;
  const std::size_t moe = ops::routing_bytes(rows, spec.router) +
                          std::max(attention, experts_scratch_bytes(spec, rows));
  return stream + std::max(dense, moe);
}

std::size_t kv_layer_bytes(const ModelSpec& spec, ops::KvFormat format) {
  return static_cast<std::size_t>(ops::kKvBlockTokens * spec.mla.cache_width()) *
         ops::kv_value_bytes(format);
}

}  // namespace dsfp4::model
