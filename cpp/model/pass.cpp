#include "model/pass.h"

#include <cstddef>

#include "model/rope.h"
#include "ops/mlp.h"

namespace dsfp4::model {
namespace {

using ops::scratch_matrix;

std::vector<std::int64_t> positions_of(std::span<const ops::SequenceRows> sequences) {
  std::vector<std::int64_t> positions;
  for (const ops::SequenceRows& sequence : sequences) {
    for (std::int64_t r = 0; r < sequence.rows; ++r) positions.push_back(sequence.position + r);
  }
  return positions;
}

// A recording ends with the step, also where that fails.
struct DropUnlessEnded {
  ops::Backend& backend;
  ~DropUnlessEnded() { backend.drop_recorded(); }
};

}  // namespace

Pass::Pass(const Decoder& decoder, const Batch& batch, memory::Arena& arena)
    : decoder_(decoder),
      batch_(batch),
      sequences_(batch.sequences.begin(), batch.sequences.end()),
      scope_(arena),
      arena_(arena) {
  const auto rows = static_cast<std::int64_t>(batch.ids.size());
  const ModelSpec& spec = decoder.spec_;
  x_ = scratch_matrix(arena, rows, spec.hidden_size);
  normed_ = scratch_matrix(arena, rows, spec.hidden_size);
  block_ = scratch_matrix(arena, rows, spec.hidden_size);
  cos_sin_ = scratch_matrix(arena, rows, spec.mla.qk_rope_head_dim);
}

void Pass::advance() {
  if (done_) return;
  // Whoever ran last may have been of the other phase.
  decoder_.backend_.begin_step(batch_.phase);
  if (begun_) {
    piece();
    return;
  }
  begun_ = true;
  switch (begin()) {
    case ops::Backend::StepRecording::kReplayed:
      done_ = true;
      break;
    case ops::Backend::StepRecording::kBegun: {
      const DropUnlessEnded recording{decoder_.backend_};
      embed();
      while (!done_) piece();
      decoder_.backend_.end_recorded();
      break;
    }
    case ops::Backend::StepRecording::kNone:
      embed();
      break;
  }
}

ops::Backend::StepRecording Pass::begin() {
  ops::Backend& backend = decoder_.backend_;
  std::vector<float> angles(static_cast<std::size_t>(cos_sin_.rows * cos_sin_.cols));
  fill_cos_sin(decoder_.spec_.rope, positions_of(sequences_),
               {angles.data(), cos_sin_.rows, cos_sin_.cols, cos_sin_.cols});
  backend.upload(angles.data(), cos_sin_.data, angles.size() * sizeof(float));
  const bool hosts_part = batch_.forced_experts != nullptr || batch_.chosen_experts != nullptr ||
                          batch_.router_logits != nullptr;
  if (batch_.phase != Phase::kDecode || hosts_part) return ops::Backend::StepRecording::kNone;
  return backend.begin_recorded(batch_.ids, sequences_);
}

void Pass::embed() {
  decoder_.backend_.embed(decoder_.weights_.embed_tokens, batch_.ids, x_);
  decoder_.experts_.begin_step(x_.rows, ahead_);
}

void Pass::piece() {
  if (work_ == nullptr) {
    run_layer();
  } else if (!work_->advance()) {
    work_.reset();
    end_layer();
  }
}

// All that needs the layer's dense weights; the routed experts are begun.
void Pass::run_layer() {
  if (!use_) use_.emplace(decoder_.streamed_, layer_);
  if (!use_->enter()) return;
  const ModelSpec& spec = decoder_.spec_;
  ops::Backend& backend = decoder_.backend_;
  const LayerWeights& weights = decoder_.weights_.layers[static_cast<std::size_t>(layer_)];
  const std::size_t layer_bytes = kv_layer_bytes(spec, decoder_.kv_format_);
  for (ops::SequenceRows& sequence : sequences_) {
    sequence.kv.layer_offset = static_cast<std::size_t>(layer_) * layer_bytes;
    sequence.kv.scale = weights.self_attn.k_scale;
  }
  backend.rms_norm(x_, weights.input_layernorm, spec.rms_norm_eps, normed_);
  mla_attention(spec, weights.self_attn, {batch_.phase, sequences_, cos_sin_}, backend, arena_,
                normed_, block_);
  backend.add(block_, x_);

  backend.rms_norm(x_, weights.post_attention_layernorm, spec.rms_norm_eps, normed_);
  if (spec.is_moe(layer_)) {
    layer_scope_.emplace(arena_);
    work_ = start_moe(spec, layer_, weights, expert_choice(), backend, decoder_.experts_, ahead_,
                      arena_, normed_, block_);
  } else {
    ops::mlp(weights.mlp, backend, arena_, normed_, block_);
    end_layer();
  }
  use_.reset();
}

void Pass::end_layer() {
  layer_scope_.reset();
  ops::Backend& backend = decoder_.backend_;
  backend.add(block_, x_);
  if (++layer_ < decoder_.spec_.layers) return;
  backend.rms_norm(x_, decoder_.weights_.norm, decoder_.spec_.rms_norm_eps, x_);
  done_ = true;
}

ExpertChoice Pass::expert_choice() const {
  const ops::RouterSpec& router = decoder_.spec_.router;
  const std::int64_t moe_layer = layer_ - decoder_.spec_.dense_layers;
  const std::int64_t offset = moe_layer * batch_.expert_layer_stride;
  const std::size_t count = batch_.ids.size() * static_cast<std::size_t>(router.top_k);
  ExpertChoice choice;
  if (batch_.forced_experts != nullptr) choice.forced = {batch_.forced_experts + offset, count};
  if (batch_.chosen_experts != nullptr) choice.chosen = {batch_.chosen_experts + offset, count};
  if (batch_.router_logits != nullptr) {
    choice.logits = {batch_.router_logits + moe_layer * batch_.logits_layer_stride,
                     batch_.ids.size() * static_cast<std::size_t>(router.experts)};
  }
  return choice;
}

}  // namespace dsfp4::model
