#include "residency/plan.h"

#include <algorithm>
#include <string>

#include "dsfp4/error.h"

namespace dsfp4::residency {
namespace {

// `count` of `layers`, evenly spread.
std::vector<bool> spread(std::size_t count, std::size_t layers) {
  std::vector<bool> chosen(layers);
  for (std::size_t i = 0; i < layers; ++i) {
    chosen[i] = (i + 1) * count / layers > i * count / layers;
  }
  return chosen;
}

// What is saved by streaming these layers; 0 if the buffers take more.
std::uint64_t saved_by(const RamNeeds& needs, const std::vector<bool>& streamed) {
  std::uint64_t saved = 0;
  for (std::size_t i = 0; i < streamed.size(); ++i) {
    if (streamed[i]) saved += needs.layer_bytes[i];
  }
  return saved - std::min(saved, needs.layer_buffer_bytes);
}

// Streams as few layers as make room for `floor` bytes; returns what is saved.
std::uint64_t stream_layers(const RamNeeds& needs, std::uint64_t floor, std::uint64_t available,
                            std::vector<bool>& streamed) {
  const std::size_t layers = needs.layer_bytes.size();
  for (std::size_t count = 1; count <= layers; ++count) {
    streamed = spread(count, layers);
    const std::uint64_t saved = saved_by(needs, streamed);
    if (floor - saved <= available) return saved;
  }
  const std::uint64_t least = floor - (layers > 0 ? saved_by(needs, streamed) : 0);
  throw MemoryLimitError("what is always in memory and the smallest buffers for what is not", least,
                         available, "raise ram_limit, or lower max_context");
}

// Slots for experts on their way.
std::uint64_t staging_slots(const RamNeeds& needs, const RamWishes& wishes) {
  if (!wishes.prefetch_size) return std::min(2 * needs.experts_per_token, needs.experts);
  const std::uint64_t slots = std::min(*wishes.prefetch_size / needs.slot_bytes, needs.experts);
  if (slots == 0) {
    throw ParameterError("prefetch_size", "must hold at least one expert, " +
                                              std::to_string(needs.slot_bytes) + " bytes");
  }
  return slots;
}

}  // namespace

std::size_t RamPlan::streamed_layers() const {
  return static_cast<std::size_t>(std::ranges::count(streamed, true));
}

RamPlan plan_ram(const RamNeeds& needs, const RamWishes& wishes, std::uint64_t available) {
  const bool cache_holds_all =
      !wishes.cpu_cache_size || *wishes.cpu_cache_size >= needs.slot_bytes * needs.experts;
  RamPlan plan;
  plan.expert_bytes = needs.expert_bytes;
  plan.total_bytes = needs.others + needs.expert_bytes;
  if (cache_holds_all && plan.total_bytes <= available) return plan;

  plan.tiered = needs.experts > 0;
  const std::uint64_t staging = plan.tiered ? staging_slots(needs, wishes) : 0;
  std::uint64_t others = needs.others;
  if (const std::uint64_t floor = others + staging * needs.slot_bytes; floor > available) {
    others -= stream_layers(needs, floor, available, plan.streamed);
  }
  if (plan.tiered) {
    const std::uint64_t floor = others + staging * needs.slot_bytes;
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
  }
  plan.total_bytes = others + plan.expert_bytes;
  return plan;
}

}  // namespace dsfp4::residency
