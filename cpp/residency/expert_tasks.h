// Groups the (token, slot) pairs of a routing by expert.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace dsfp4::residency {

/// One chosen expert and the pairs (token * top_k + slot, ascending) that chose it.
struct ChosenExpert {
  std::int32_t expert = 0;
  std::span<std::int32_t> pairs;
};

/// The distinct experts of `used` [tokens, top_k], ascending. `pairs` is scratch with one entry a
/// pair; the spans of the result point into it.
std::vector<ChosenExpert> group_by_expert(std::span<const std::int32_t> used,
                                          std::span<std::int32_t> pairs);

}  // namespace dsfp4::residency
