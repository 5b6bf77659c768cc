#include "residency/expert_tasks.h"

#include <algorithm>
#include <cstddef>

#include "ops/mlp.h"
#include "ops/scratch.h"

namespace dsfp4::residency {

void shared_into(const ExpertLayer& layer, ops::Ops& ops, memory::Arena& arena) {
  if (layer.phase == ops::Phase::kPrefill) return;
  if (layer.shared != nullptr) {
    ops::mlp(*layer.shared, ops, arena, layer.x, layer.y, layer.phase);
  } else {
    ops.zero(layer.y);
  }
}

std::vector<ChosenExpert> group_by_expert(std::span<const std::int32_t> used,
                                          std::span<std::int32_t> pairs) {
  if (used.empty()) return {};
  // By counting: a long prompt has hundreds of thousands of pairs.
  std::vector<std::size_t> ends(static_cast<std::size_t>(std::ranges::max(used)) + 1, 0);
  for (const std::int32_t expert : used) ++ends[static_cast<std::size_t>(expert)];
  std::vector<ChosenExpert> chosen;
  chosen.reserve(std::min(ends.size(), used.size()));
  std::size_t begin = 0;
  for (std::size_t e = 0; e < ends.size(); ++e) {
    const std::size_t count = ends[e];
    ends[e] = begin;
    if (count == 0) continue;
    chosen.push_back({static_cast<std::int32_t>(e), pairs.subspan(begin, count)});
    begin += count;
  }
  for (std::size_t pair = 0; pair < used.size(); ++pair) {
    pairs[ends[static_cast<std::size_t>(used[pair])]++] = static_cast<std::int32_t>(pair);
  }
  return chosen;
}

std::int64_t pairs_held(std::int64_t tokens, std::int64_t top_k, ops::Phase phase) {
  return phase == ops::Phase::kPrefill ? ops::added_pairs(tokens, top_k) : tokens * top_k;
}

std::size_t pair_scratch_bytes(const MoeShape& shape, std::int64_t tokens, ops::Phase phase) {
  const std::int64_t pairs = pairs_held(tokens, shape.router.top_k, phase);
  return ops::scratch_bytes(pairs * shape.moe_intermediate_size) +
         ops::scratch_bytes(pairs * shape.hidden_size);
}

}  // namespace dsfp4::residency
