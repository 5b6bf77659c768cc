#include "model/decoder.h"

#include <algorithm>

#include "ops/mlp.h"

namespace dsfp4::model {

void Decoder::head(ops::ConstMatrix hidden, ops::Matrix logits) const {
  backend_.linear(weights_.lm_head, hidden, logits);
}

std::size_t scratch_bytes(const ModelSpec& spec, std::int64_t rows, Phase phase) {
  const std::size_t stream = 3 * ops::scratch_bytes(rows * spec.hidden_size) +
                             ops::scratch_bytes(rows * spec.mla.qk_rope_head_dim);
  return stream + std::max({mla_scratch_bytes(spec, rows, phase),
                            ops::mlp_scratch_bytes(spec.intermediate_size, rows),
                            spec.moe_layers() > 0 ? moe_scratch_bytes(spec, rows) : 0});
}

std::size_t kv_layer_bytes(const ModelSpec& spec, ops::KvFormat format) {
  return static_cast<std::size_t>(ops::kKvBlockTokens * spec.mla.cache_width()) *
         ops::kv_value_bytes(format);
}

}  // namespace dsfp4::model
