#include "model/decoder.h"

#include <algorithm>
#include <vector>

#include "model/rope.h"
#include "ops/mlp.h"

namespace dsfp4::model {
namespace {

using ops::Matrix;
using ops::scratch_matrix;
using ops::ScratchScope;

std::vector<std::int64_t> positions_of(std::span<const ops::SequenceRows> sequences) {
  std::vector<std::int64_t> positions;
  for (const ops::SequenceRows& sequence : sequences) {
    for (std::int64_t r = 0; r < sequence.rows; ++r) positions.push_back(sequence.position + r);
  }
  return positions;
}

}  // namespace

Matrix Decoder::forward(const Batch& batch, memory::Arena& arena) const {
  const auto rows = static_cast<std::int64_t>(batch.ids.size());
  const Matrix x = scratch_matrix(arena, rows, spec_.hidden_size);  // the residual stream
  const ScratchScope scope(arena);
  const Matrix normed = scratch_matrix(arena, rows, spec_.hidden_size);
  const Matrix block = scratch_matrix(arena, rows, spec_.hidden_size);
  const Matrix cos_sin = scratch_matrix(arena, rows, spec_.mla.qk_rope_head_dim);
  std::vector<float> angles(static_cast<std::size_t>(rows * cos_sin.cols));
  fill_cos_sin(spec_.rope, positions_of(batch.sequences),
               {angles.data(), rows, cos_sin.cols, cos_sin.cols});

  std::vector<ops::SequenceRows> sequences(batch.sequences.begin(), batch.sequences.end());
  const Step step{batch.phase, sequences, cos_sin};
  backend_.begin_step(batch.phase);
  backend_.upload(angles.data(), cos_sin.data, angles.size() * sizeof(float));
  const bool recorded = batch.phase == Phase::kDecode && batch.forced_experts == nullptr &&
                        batch.chosen_experts == nullptr && batch.router_logits == nullptr;
  if (recorded && backend_.begin_recorded(batch.ids, sequences)) return x;
  backend_.embed(weights_.embed_tokens, batch.ids, x);
  experts_.begin_step(rows);
  const std::size_t layer_bytes = kv_layer_bytes(spec_, kv_format_);
  const Poll poll = recorded ? Poll() : batch.poll;  // a recording ends where it began
  for (std::int64_t layer = 0; layer < spec_.layers; ++layer) {
    ask(poll);
    const residency::LayerStream::Use use(streamed_, layer, poll);
    const LayerWeights& weights = weights_.layers[static_cast<std::size_t>(layer)];
    for (ops::SequenceRows& sequence : sequences) {
      sequence.kv.layer_offset = static_cast<std::size_t>(layer) * layer_bytes;
      sequence.kv.scale = weights.self_attn.k_scale;
    }
    backend_.rms_norm(x, weights.input_layernorm, spec_.rms_norm_eps, normed);
    mla_attention(spec_, weights.self_attn, step, backend_, arena, normed, block);
    backend_.add(block, x);

    backend_.rms_norm(x, weights.post_attention_layernorm, spec_.rms_norm_eps, normed);
    if (spec_.is_moe(layer)) {
      moe(spec_, layer, weights, expert_choice(batch, layer), backend_, experts_, poll, arena,
          normed, block);
    } else {
      ops::mlp(weights.mlp, backend_, arena, normed, block);
    }
    backend_.add(block, x);
  }
  backend_.rms_norm(x, weights_.norm, spec_.rms_norm_eps, x);
  if (recorded) backend_.end_recorded();
  return x;
}

void Decoder::head(ops::ConstMatrix hidden, Matrix logits) const {
  backend_.linear(weights_.lm_head, hidden, logits);
}

ExpertChoice Decoder::expert_choice(const Batch& batch, std::int64_t layer) const {
  const std::int64_t offset = (layer - spec_.dense_layers) * batch.expert_layer_stride;
  const std::size_t count = batch.ids.size() * static_cast<std::size_t>(spec_.router.top_k);
  ExpertChoice choice;
  if (batch.forced_experts != nullptr) choice.forced = {batch.forced_experts + offset, count};
  if (batch.chosen_experts != nullptr) choice.chosen = {batch.chosen_experts + offset, count};
  if (batch.router_logits != nullptr) {
    choice.logits = {batch.router_logits + (layer - spec_.dense_layers) * batch.logits_layer_stride,
                     batch.ids.size() * static_cast<std::size_t>(spec_.router.experts)};
  }
  return choice;
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
