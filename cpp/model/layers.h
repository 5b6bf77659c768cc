// The layers of a DeepSeek model: attention and the two kinds of feed-forward. A step is a batch of
// rows (tokens) of one or more sequences; scratch comes from the caller's arena and is given back.
#pragma once

#include <cstdint>
#include <span>

#include "memory/arena.h"
#include "model/spec.h"
#include "model/weights.h"
#include "ops/ops.h"
#include "ops/scratch.h"

namespace dsfp4::model {

using ops::Phase;

/// What every layer of one step shares.
struct Step {
  Phase phase = Phase::kPrefill;
  std::span<const ops::SequenceRows> sequences;  // their kv.layer_offset is the current layer's
  ops::ConstMatrix cos_sin;                      // [rows, qk_rope_head_dim]
};

/// Multi-head latent attention (DeepSeek-V2, section 2.1): x and out are [rows, hidden].
void mla_attention(const ModelSpec& spec, const AttentionWeights& weights, const Step& step,
                   ops::Ops& ops, memory::Arena& arena, ops::ConstMatrix x, ops::Matrix out);
/// The router of a MoE layer (DeepSeek-V3, section 2.1.2): x is [rows, hidden], `forced` as in
/// Ops::route(), `routing` of take_routing().
void choose_experts(const ModelSpec& spec, const LayerWeights& weights, Phase phase,
                    std::span<const std::int32_t> forced, ops::Ops& ops, ops::ConstMatrix x,
                    const ops::Routing& routing);

/// Scratch bytes that attention, and routed experts wherever they are, take from the arena in a
/// step of `rows` rows.
std::size_t mla_scratch_bytes(const ModelSpec& spec, std::int64_t rows, Phase phase);
std::size_t experts_scratch_bytes(const ModelSpec& spec, std::int64_t rows, Phase phase);

}  // namespace dsfp4::model
