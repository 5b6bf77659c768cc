// What every ExpertRunner does: the shared expert, and the (token, slot) pairs by expert.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "memory/arena.h"
#include "ops/backend.h"

namespace dsfp4::residency {

/// More rows than this are a prompt: its experts pass by the cache once that is full.
inline constexpr std::int64_t kDecodeRows = 16;

/// One chosen expert and the pairs (token * top_k + slot, ascending) that chose it.
struct ChosenExpert {
  std::int32_t expert = 0;
  std::span<std::int32_t> pairs;
};

/// y = shared(x), or zero where there is no shared expert.
void shared_into(const ops::ExpertView* shared, ops::Backend& backend, memory::Arena& arena,
                 ops::ConstMatrix x, ops::Matrix y);

/// The distinct experts of `used` [tokens, top_k], ascending. `pairs` is scratch with one entry a
/// pair; the spans of the result point into it.
std::vector<ChosenExpert> group_by_expert(std::span<const std::int32_t> used,
                                          std::span<std::int32_t> pairs);

}  // namespace dsfp4::residency
