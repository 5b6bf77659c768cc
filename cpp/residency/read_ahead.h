// Experts that one step will probably need: named by the Prefetcher, read while the disk is idle.
#pragma once

#include <cstdint>
#include <vector>

#include "residency/policy.h"

namespace dsfp4::residency {

struct ReadAhead {
  std::vector<ExpertKey> named;  // not begun yet; back() is next
  /// The number of the step's prediction that is on its way; 0: none is.
  std::uint64_t guess = 0;
  /// Experts predicted for the step's next MoE layer, the likeliest first; empty: no prediction.
  std::vector<std::int32_t> predicted;
};

}  // namespace dsfp4::residency
