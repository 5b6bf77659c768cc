#include "residency/expert_tasks.h"

#include <algorithm>
#include <cstddef>
#include <numeric>

#include "ops/mlp.h"
#include "ops/scratch.h"

namespace dsfp4::residency {

void shared_into(const ExpertLayer& layer, ops::Ops& ops, memory::Arena& arena) {
  if (layer.shared != nullptr) {
    ops::mlp(*layer.shared, ops, arena, layer.x, layer.y, layer.phase);
  } else {
    ops.zero(layer.y);
  }
}

std::vector<ChosenExpert> group_by_expert(std::span<const std::int32_t> used,
                                          std::span<std::int32_t> pairs) {
  std::iota(pairs.begin(), pairs.end(), 0);
  std::stable_sort(pairs.begin(), pairs.end(), [&](std::int32_t a, std::int32_t b) {
    return used[static_cast<std::size_t>(a)] < used[static_cast<std::size_t>(b)];
  });
  std::vector<ChosenExpert> chosen;
  for (std::size_t begin = 0; begin < pairs.size();) {
    const std::int32_t expert = used[static_cast<std::size_t>(pairs[begin])];
    std::size_t end = begin + 1;
    while (end < pairs.size() && used[static_cast<std::size_t>(pairs[end])] == expert) ++end;
    chosen.push_back({expert, pairs.subspan(begin, end - begin)});
    begin = end;
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
