// What every ExpertRunner does: the shared expert, and the (token, slot) pairs by expert.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "memory/arena.h"
#include "ops/ops.h"
#include "residency/expert_runner.h"

namespace dsfp4::residency {

/// One chosen expert and the pairs (token * top_k + slot, ascending) that chose it.
struct ChosenExpert {
  std::int32_t expert = 0;
  std::span<std::int32_t> pairs;
};

/// In decode, y = shared(x), or zero where there is no shared expert. A prompt's y has that
/// already.
void shared_into(const ExpertLayer& layer, ops::Ops& ops, memory::Arena& arena);

/// The distinct experts of `used` [tokens, top_k], ascending. `pairs` is scratch with one entry a
/// pair; the spans of the result point into it.
std::vector<ChosenExpert> group_by_expert(std::span<const std::int32_t> used,
                                          std::span<std::int32_t> pairs);

/// Pairs whose results a step of `tokens` tokens holds at once: in prefill ops::added_pairs(), as
/// they are added at once; in decode all, tokens * top_k.
std::int64_t pairs_held(std::int64_t tokens, std::int64_t top_k, ops::Phase phase);

/// Arena bytes for these: a row of moe_intermediate_size and one of hidden_size each.
std::size_t pair_scratch_bytes(const MoeShape& shape, std::int64_t tokens, ops::Phase phase);

}  // namespace dsfp4::residency
