// The layers of a DeepSeek model: attention and the two kinds of feed-forward. A step is a batch of
// rows (tokens) of one or more sequences; scratch comes from the caller's arena and is given back.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "memory/arena.h"
#include "model/spec.h"
#include "model/weights.h"
#include "ops/backend.h"
#include "ops/scratch.h"
#include "residency/expert_runner.h"

namespace dsfp4::model {

using ops::Phase;

/// What every layer of one step shares.
struct Step {
  Phase phase = Phase::kPrefill;
  std::span<const ops::SequenceRows> sequences;  // their kv.layer_offset is the current layer's
  ops::ConstMatrix cos_sin;                      // [rows, qk_rope_head_dim]
};

/// The experts of one layer in one step, [rows, top_k] each, and the router's logits
/// [rows, experts]; empty spans where not wanted.
struct ExpertChoice {
  std::span<const std::int32_t> forced;
  std::span<std::int32_t> chosen;
  std::span<float> logits;
};

/// Multi-head latent attention (DeepSeek-V2, section 2.1): x and out are [rows, hidden].
void mla_attention(const ModelSpec& spec, const AttentionWeights& weights, const Step& step,
                   ops::Backend& backend, memory::Arena& arena, ops::ConstMatrix x,
                   ops::Matrix out);
/// Mixture of experts (DeepSeek-V3, section 2.1.2): out = shared + routed experts of model layer
/// `layer`, once the work is over. Scratch is the caller's to give back then, and x must stay.
std::unique_ptr<residency::ExpertWork> start_moe(const ModelSpec& spec, std::int64_t layer,
                                                 const LayerWeights& weights,
                                                 const ExpertChoice& choice, ops::Backend& backend,
                                                 residency::ExpertRunner& experts,
                                                 residency::ReadAhead& ahead, memory::Arena& arena,
                                                 ops::ConstMatrix x, ops::Matrix out);

/// Scratch bytes that one layer takes from the arena for a step of `rows` rows, wherever its
/// experts are.
std::size_t mla_scratch_bytes(const ModelSpec& spec, std::int64_t rows, Phase phase);
std::size_t moe_scratch_bytes(const ModelSpec& spec, std::int64_t rows);

}  // namespace dsfp4::model
