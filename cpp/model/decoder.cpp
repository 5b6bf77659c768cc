#include "model/decoder.h"

#include <algorithm>

#include "ops/mlp.h"

namespace dsfp4::model {

void Decoder::head(ops::ConstMatrix hidden, ops::Matrix logits) const {
  backend_.linear(weights_.lm_head, hidden, logits);
}

std::size_t Decoder::scratch_bytes(std::int64_t rows, Phase phase) const {
  const std::size_t stream = 3 * ops::scratch_bytes(rows * spec_.hidden_size) +
                             ops::scratch_bytes(rows * spec_.mla.qk_rope_head_dim);
  return stream + std::max({mla_scratch_bytes(spec_, rows, phase),
                            ops::mlp_scratch_bytes(spec_.intermediate_size, rows),
                            spec_.moe_layers() > 0 ? moe_scratch_bytes(spec_, experts_, rows) : 0});
}

std::size_t Decoder::kv_layer_bytes() const {
  return static_cast<std::size_t>(ops::kKvBlockTokens * spec_.mla.cache_width()) *
         ops::kv_value_bytes(kv_format_);
}

}  // namespace dsfp4::model
