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

/// y = shared(x), or zero where there is no shared expert.
void shared_into(const ExpertLayer& layer, ops::Ops& ops, memory::Arena& arena);

/// The distinct experts of `used` [tokens, top_k], ascending. `pairs` is scratch with one entry a
/// pair; the spans of the result point into it.
std::vector<ChosenExpert> group_by_expert(std::span<const std::int32_t> used,
                                          std::span<std::int32_t> pairs);

}  // namespace dsfp4::residency
