#include "residency/plan.h"

#include <algorithm>
#include <string>

#include "dsfp4/error.h"

namespace dsfp4::residency {

RamPlan plan_ram(const RamNeeds& needs, const RamWishes& wishes, std::uint64_t available) {
  const bool cache_holds_all =
      !wishes.cpu_cache_size || *wishes.cpu_cache_size >= needs.slot_bytes * needs.experts;
  RamPlan plan;
  plan.expert_bytes = needs.expert_bytes;
  plan.total_bytes = needs.others + needs.expert_bytes;
  if (needs.experts == 0 || (cache_holds_all && plan.total_bytes <= available)) {
    if (plan.total_bytes > available) {
      throw MemoryLimitError("the whole model", plan.total_bytes, available,
                             "raise ram_limit, or lower max_context");
    }
    return plan;
  }

  plan.tiered = true;
  std::uint64_t staging = std::min(2 * needs.experts_per_token, needs.experts);
  if (wishes.prefetch_size) {
    staging = std::min(*wishes.prefetch_size / needs.slot_bytes, needs.experts);
    if (staging == 0) {
      throw ParameterError("prefetch_size", "must hold at least one expert, " +
                                                std::to_string(needs.slot_bytes) + " bytes");
    }
  }
  const std::uint64_t floor = needs.others + staging * needs.slot_bytes;
  if (floor > available) {
    throw MemoryLimitError("what is always in memory and the smallest buffer for experts", floor,
                           available, "raise ram_limit, or lower max_context");
  }
  std::uint64_t cached = (available - floor) / needs.slot_bytes;
  if (wishes.cpu_cache_size) {
    const std::uint64_t wanted = *wishes.cpu_cache_size / needs.slot_bytes;
    if (wanted > cached) {
      throw MemoryLimitError("cpu_cache_size and what else is in memory",
                             floor + *wishes.cpu_cache_size, available,
                             "raise ram_limit, or lower cpu_cache_size");
    }
    cached = wanted;
  }
  plan.cache_slots = static_cast<std::size_t>(std::min(cached, needs.experts));
  plan.slots = plan.cache_slots + static_cast<std::size_t>(staging);
  plan.expert_bytes = plan.slots * needs.slot_bytes;
  plan.total_bytes = needs.others + plan.expert_bytes;
  return plan;
}

}  // namespace dsfp4::residency
