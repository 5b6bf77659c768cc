#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

#include "residency/policy.h"

namespace dsfp4::residency {

std::int64_t replay_misses(Policy& policy, std::int64_t layers, std::int64_t experts,
                           std::int64_t top_k, std::span<const std::int32_t> used,
                           std::span<const float> scores, std::int64_t capacity,
                           std::int64_t first) {
  const auto width = static_cast<std::size_t>(experts);
  const auto slots = static_cast<std::size_t>(top_k);
  const std::size_t tokens = used.size() / slots / static_cast<std::size_t>(layers);
  std::vector<bool> is_cached(static_cast<std::size_t>(layers) * width, false);
  std::vector<ExpertKey> cached;
  std::int64_t misses = 0;
  for (std::size_t t = 0; t < tokens; ++t) {
    for (std::size_t layer = 0; layer < static_cast<std::size_t>(layers); ++layer) {
      const std::size_t at = layer * tokens + t;
      const auto chosen = used.subspan(at * slots, slots);
      for (const std::int32_t e : chosen) {
        const auto key = static_cast<ExpertKey>(layer * width + static_cast<std::size_t>(e));
        if (is_cached[key]) continue;
        if (static_cast<std::int64_t>(t) >= first) ++misses;
        is_cached[key] = true;
        cached.push_back(key);
      }
      policy.use(static_cast<std::int64_t>(layer), chosen, scores.subspan(at * width, width));
      while (cached.size() > static_cast<std::size_t>(capacity)) {
        const auto least = std::ranges::min_element(
            cached, {}, [&](ExpertKey key) { return std::pair(policy.value(key), key); });
        is_cached[*least] = false;
        *least = cached.back();
        cached.pop_back();
      }
    }
  }
  return misses;
}

}  // namespace dsfp4::residency
