#include "model/pass.h"

#include <algorithm>
#include <cstddef>
#include <string>

#include "model/rope.h"
#include "ops/mlp.h"

namespace dsfp4::model {
namespace {

using ops::scratch_matrix;

// Numbers of segments: of the whole step, and of one layer in a step whose layers the host parts.
constexpr std::int64_t kWholeStep = 0;
constexpr std::int64_t kFirstLayer = 1;

std::vector<std::int64_t> positions_of(std::span<const ops::SequenceRows> sequences) {
  std::vector<std::int64_t> positions;
  for (const ops::SequenceRows& sequence : sequences) {
    for (std::int64_t r = 0; r < sequence.rows; ++r) positions.push_back(sequence.position + r);
  }
  return positions;
}

}  // namespace

Pass::Pass(const Decoder& decoder, const Batch& batch, memory::Arena& arena,
           ops::RoutingReader& routings)
    : decoder_(decoder),
      batch_(batch),
      sequences_(batch.sequences.begin(), batch.sequences.end()),
      routings_(routings),
      scope_(arena),
      arena_(arena) {
  const auto rows = static_cast<std::int64_t>(batch.ids.size());
  const ModelSpec& spec = decoder.spec_;
  x_ = scratch_matrix(arena, rows, spec.hidden_size);
  normed_ = scratch_matrix(arena, rows, spec.hidden_size);
  block_ = scratch_matrix(arena, rows_at_once(rows), spec.hidden_size);
  cos_sin_ = scratch_matrix(arena, rows, spec.mla.qk_rope_head_dim);
}

// Of the dense part of a layer.
std::int64_t Pass::rows_at_once(std::int64_t rows) const {
  return batch_.phase == Phase::kPrefill ? std::min(rows, batch_.dense_rows) : rows;
}

bool Pass::in_pieces() const {
  return decoder_.streamed_ != nullptr || decoder_.embedding_ != nullptr ||
         decoder_.experts_.needs_host(batch_.phase) || host_takes_part();
}

bool Pass::host_takes_part() const {
  return batch_.forced_experts != nullptr || batch_.chosen_experts != nullptr ||
         batch_.router_logits != nullptr;
}

void Pass::advance() {
  if (done_) return;
  if (begun_) {
    piece();
    return;
  }
  begun_ = true;
  const std::vector<float> angles = cos_sin_of(decoder_.spec_.rope, positions_of(sequences_));
  decoder_.ops_.device().upload(angles.data(), cos_sin_.data, angles.size() * sizeof(float));
  if (batch_.phase == Phase::kPrefill || in_pieces()) {
    embed();
    return;
  }
  if (decoder_.trace_ != nullptr) decoder_.trace_->begin_ops();
  decoder_.ops_.segment({kWholeStep, batch_.ids, sequences_}, [this] {
    in_segment_ = true;
    embed();
    while (!done_) piece();
  });
  if (decoder_.trace_ != nullptr) decoder_.trace_->end_ops("all layers");
  done_ = true;
}

void Pass::embed() {
  const WeightView& table = decoder_.weights_.embed_tokens;
  if (decoder_.embedding_ != nullptr) {
    decoder_.embedding_->embed(table, batch_.ids, decoder_.ops_.device(), x_);
  } else {
    decoder_.ops_.embed(table, batch_.ids, x_);
  }
  decoder_.experts_.begin_step(batch_.phase, x_.rows, ahead_);
}

void Pass::piece() {
  if (work_ == nullptr) {
    run_layer();
  } else if (!work_->advance()) {
    work_.reset();
    end_layer();
  }
}

// Some rows through all that needs the layer's dense weights; after the last ones, the routed
// experts are begun.
void Pass::run_layer() {
  if (!use_) use_.emplace(decoder_.streamed_, layer_);
  if (!use_->enter()) return;
  const LayerWeights& weights = decoder_.weights_.layers[static_cast<std::size_t>(layer_)];
  if (dense_done_ == 0) begin_layer(weights);
  const std::int64_t rows = rows_at_once(x_.rows - dense_done_);
  run_ops([&] { dense_part(weights, dense_done_, rows); });
  dense_done_ += rows;
  if (dense_done_ < x_.rows) return;
  dense_done_ = 0;
  if (decoder_.spec_.is_moe(layer_)) {
    start_experts(weights);
  } else {
    end_layer();
  }
  use_.reset();
}

void Pass::begin_layer(const LayerWeights& weights) {
  const ModelSpec& spec = decoder_.spec_;
  const std::size_t layer_bytes = kv_layer_bytes(spec, decoder_.kv_format_);
  for (ops::SequenceRows& sequence : sequences_) {
    sequence.kv.layer_offset = static_cast<std::size_t>(layer_) * layer_bytes;
    sequence.kv.scale = weights.self_attn.k_scale;
  }
  if (!spec.is_moe(layer_)) return;
  layer_scope_.emplace(arena_);
  routing_ = ops::take_routing(arena_, x_.rows, spec.router);
}

// Runs ops of this layer; in a decode step, as a segment.
void Pass::run_ops(const std::function<void()>& body) {
  // The experts to use come from the host, and no segment names them.
  const bool forced = batch_.forced_experts != nullptr;
  residency::DeviceTrace* const trace = in_segment_ ? nullptr : decoder_.trace_;
  if (trace != nullptr) trace->begin_ops();
  if (in_segment_ || forced || batch_.phase == Phase::kPrefill) {
    body();
  } else {
    decoder_.ops_.segment({kFirstLayer + layer_, batch_.ids, sequences_}, body);
  }
  if (trace != nullptr) trace->end_ops("layer " + std::to_string(layer_) + " dense");
}

// Attention, and the MLP or the router, for `rows` rows from `first` on. In a prefill the shared
// experts, too, as nobody else adds to the residual stream yet.
void Pass::dense_part(const LayerWeights& weights, std::int64_t first, std::int64_t rows) {
  const ModelSpec& spec = decoder_.spec_;
  ops::Ops& ops = decoder_.ops_;
  const ops::Matrix x = x_.slice(first, rows);
  const ops::Matrix normed = normed_.slice(first, rows);
  const ops::Matrix block = block_.slice(0, rows);
  const std::vector<ops::SequenceRows> sequences = sequences_of(first, rows);
  ops.rms_norm(x, weights.input_layernorm, spec.rms_norm_eps, normed);
  mla_attention(spec, weights.self_attn, {batch_.phase, sequences, cos_sin_.slice(first, rows)},
                ops, arena_, normed, block);
  ops.add(block, x);
  ops.rms_norm(x, weights.post_attention_layernorm, spec.rms_norm_eps, normed);
  if (spec.is_moe(layer_)) {
    choose_experts(spec, weights, batch_.phase, forced_experts(first, rows), ops, normed,
                   routing_of(first, rows));
    if (batch_.phase == Phase::kDecode || spec.shared_intermediate_size == 0) return;
  }
  const ops::ExpertView& mlp = spec.is_moe(layer_) ? weights.shared_experts : weights.mlp;
  ops::mlp(mlp, ops, arena_, normed, block, batch_.phase);
  ops.add(block, x);
}

void Pass::start_experts(const LayerWeights& weights) {
  const ModelSpec& spec = decoder_.spec_;
  ops::HostRouting on_host;
  if (decoder_.experts_.needs_host(batch_.phase) || host_takes_part()) {
    const bool with_x = decoder_.experts_.needs_x(x_.rows);
    routings_.fetch(routing_, with_x ? normed_ : ops::ConstMatrix());
    on_host = routings_.get();
    tell_choice(on_host);
  }
  const bool adds = batch_.phase == Phase::kPrefill;
  const bool with_shared = !adds && spec.shared_intermediate_size > 0;
  work_ = decoder_.experts_.start({.layer = layer_,
                                   .phase = batch_.phase,
                                   .x = normed_,
                                   .routing = routing_,
                                   .on_host = on_host,
                                   .top_k = spec.router.top_k,
                                   .y = adds ? x_ : block_,
                                   .shared = with_shared ? &weights.shared_experts : nullptr},
                                  arena_, ahead_);
}

void Pass::end_layer() {
  layer_scope_.reset();
  ops::Ops& ops = decoder_.ops_;
  if (batch_.phase == Phase::kDecode && decoder_.spec_.is_moe(layer_)) ops.add(block_, x_);
  if (++layer_ < decoder_.spec_.layers) return;
  ops.rms_norm(x_, decoder_.weights_.norm, decoder_.spec_.rms_norm_eps, x_);
  done_ = true;
}

// The parts of the sequences that lie in those rows, which count from 0 there.
std::vector<ops::SequenceRows> Pass::sequences_of(std::int64_t first, std::int64_t rows) const {
  std::vector<ops::SequenceRows> parts;
  parts.reserve(sequences_.size());
  for (const ops::SequenceRows& sequence : sequences_) {
    const std::int64_t begin = std::max(sequence.first_row, first);
    const std::int64_t end = std::min(sequence.first_row + sequence.rows, first + rows);
    if (begin >= end) continue;
    const std::int64_t position = sequence.position + begin - sequence.first_row;
    parts.push_back({begin - first, end - begin, position, sequence.kv});
  }
  return parts;
}

ops::Routing Pass::routing_of(std::int64_t first, std::int64_t rows) const {
  const auto top_k = decoder_.spec_.router.top_k;
  const auto at = static_cast<std::size_t>(first * top_k);
  const auto pairs = static_cast<std::size_t>(rows * top_k);
  return {routing_.experts.subspan(at, pairs), routing_.used.subspan(at, pairs),
          routing_.weights.subspan(at, pairs), routing_.logits.slice(first, rows)};
}

std::span<const std::int32_t> Pass::forced_experts(std::int64_t first, std::int64_t rows) const {
  if (batch_.forced_experts == nullptr) return {};
  const ModelSpec& spec = decoder_.spec_;
  const std::int64_t moe_layer = layer_ - spec.dense_layers;
  return {
      batch_.forced_experts + moe_layer * batch_.expert_layer_stride + first * spec.router.top_k,
      static_cast<std::size_t>(rows * spec.router.top_k)};
}

void Pass::tell_choice(const ops::HostRouting& routing) const {
  const std::int64_t moe_layer = layer_ - decoder_.spec_.dense_layers;
  if (batch_.chosen_experts != nullptr) {
    std::ranges::copy(routing.experts,
                      batch_.chosen_experts + moe_layer * batch_.expert_layer_stride);
  }
  if (batch_.router_logits != nullptr) {
    std::ranges::copy(routing.logits,
                      batch_.router_logits + moe_layer * batch_.logits_layer_stride);
  }
}

}  // namespace dsfp4::model
