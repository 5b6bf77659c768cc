#include "residency/planning.h"

#include <algorithm>
#include <span>
#include <utility>

#include "base/checked.h"
#include "dsfp4/error.h"
#include "ops/ops.h"

namespace dsfp4::residency::planning {
namespace {

std::uint64_t kv_bytes(const ModelBytes& model, std::int64_t tokens) {
  const auto blocks = static_cast<std::uint64_t>(ceil_div(tokens, ops::kKvBlockTokens));
  return checked_mul(blocks, model.kv_block).value_or(kMost);
}

// The cost of a prompt of the longest chunk and an answer of kAnswerTokens: bytes read from the
// SSD, and a share of those copied to VRAM, as that wire is faster. Experts that are not cached
// cross once for each chunk, chosen ones once for each token, and streamed layers once for each of
// both.
double cost_of_answer(const ModelBytes& model, const Plan& plan) {
  constexpr double kCopyShare = 0.25;  // PCIe has about four times the rate of an SSD
  const bool on_gpu = plan.device_slots > 0;
  const auto missed = [&](std::size_t cache) {
    const auto experts = static_cast<double>(model.experts);
    return 1.0 - std::min(static_cast<double>(cache), experts) / experts;
  };
  double share = missed(plan.cache_slots);
  if (on_gpu) share += kCopyShare * missed(plan.device_cache_slots);
  double streamed = 0.0;
  for (std::size_t i = 0; i < plan.streamed.size(); ++i) {
    if (plan.streamed[i]) streamed += static_cast<double>(model.layers[i]);
  }
  if (on_gpu) streamed *= kCopyShare;
  const auto slot = static_cast<double>(model.expert_slot);
  const double all = share * slot * static_cast<double>(model.experts);
  const double chosen =
      share * slot * static_cast<double>(model.experts_per_token * model.moe_layers);
  const auto chunks = static_cast<double>(ceil_div(model.steps.back().rows, plan.chunk));
  return chunks * (all + streamed) + kAnswerTokens * (chosen + streamed);
}

}  // namespace

std::uint64_t ram_limit(const Budgets& budgets) {
  return budgets.ram_limit > 0 ? budgets.ram_limit : memory::default_ram_limit(budgets.machine);
}

std::uint64_t sum_of(std::initializer_list<std::uint64_t> parts) {
  std::uint64_t sum = 0;
  for (const std::uint64_t part : parts) sum = checked_add(sum, part).value_or(kMost);
  return sum;
}

std::uint64_t ram_ceiling(const Budgets& budgets) {
  return std::min(ram_limit(budgets), most_ram(budgets.machine));
}

std::string shorter_context(const ModelBytes& model, std::uint64_t beside_kv,
                            std::uint64_t available) {
  const std::uint64_t room = available - std::min(available, beside_kv);
  const std::uint64_t blocks = model.kv_block > 0 ? room / model.kv_block : 0;
  if (blocks == 0) return "";
  return "max_context to " + std::to_string(blocks * ops::kKvBlockTokens);
}

std::vector<bool> spread(std::size_t count, std::size_t layers) {
  std::vector<bool> chosen(layers);
  for (std::size_t i = 0; i < layers; ++i) {
    chosen[i] = (i + 1) * count / layers > i * count / layers;
  }
  return chosen;
}

bool wants_all(const ModelBytes& model, const Wishes& wishes) {
  return wishes.max_experts.value_or(kMost) >= model.experts &&
         wishes.max_gpu_layers.value_or(kMost) >= model.layers.size() &&
         wishes.cpu_cache_size.value_or(kMost) >= model.expert_slot * model.experts;
}

std::optional<Shortage> place_slots(const ModelBytes& model, const Wishes& wishes,
                                    std::uint64_t others, std::uint64_t ceiling, Plan& plan) {
  const std::uint64_t staging = staging_slots(model, wishes);
  const std::uint64_t wanted = wished_slots(model, wishes);
  const std::uint64_t floor = sum_of({others, staging * model.expert_slot});
  const std::uint64_t needed = sum_of({floor, wanted * model.expert_slot});
  const char* purpose = wanted > 0 ? kCache : kFloor;
  if (floor > ceiling) {
    if (sum_of({others, model.expert_slot}) > ceiling) return Shortage{purpose, needed, ""};
    return Shortage{purpose, needed,
                    wanted > 0 ? "prefetch_size and cpu_cache_size" : "prefetch_size"};
  }
  if (needed > ceiling) return Shortage{purpose, needed, "cpu_cache_size"};
  std::uint64_t cached = (ceiling - floor) / model.expert_slot;
  if (wishes.cpu_cache_size) cached = wanted;
  plan.cache_slots = static_cast<std::size_t>(std::min(cached, model.experts));
  plan.slots = plan.cache_slots + static_cast<std::size_t>(staging);
  plan.expert_bytes = plan.slots * model.expert_slot;
  return std::nullopt;
}

Plan whole_plan(const ModelBytes& model, const Wishes& wishes, const ModelBytes::Step& step) {
  Plan plan;
  plan.chunk = step.rows;
  plan.formats = model.formats;
  plan.dense_bytes = model.dense;
  plan.expert_bytes = model.expert_bytes;
  plan.kv_bytes = kv_bytes(model, wishes.max_context);
  plan.step_bytes = step.bytes;
  return plan;
}

Trial best_plan(Attempt attempt, const ModelBytes& model, const Budgets& budgets,
                const Wishes& wishes) {
  Trial first = attempt(model, budgets, wishes, model.steps.front());
  if (std::holds_alternative<Shortage>(first)) return first;
  Plan best = std::get<Plan>(std::move(first));
  if (!best.tiered) return best;
  for (const ModelBytes::Step& step : std::span(model.steps).subspan(1)) {
    if (step.bytes > kActivationBytes) break;
    Trial trial = attempt(model, budgets, wishes, step);
    auto* const plan = std::get_if<Plan>(&trial);
    if (plan != nullptr && cost_of_answer(model, *plan) < cost_of_answer(model, best)) {
      best = std::move(*plan);
    }
  }
  return best;
}

std::uint64_t vram_of(const Budgets& budgets) { return budgets.vram.value_or(0); }

std::uint64_t staging_slots(const ModelBytes& model, const Wishes& wishes) {
  if (!wishes.prefetch_size) return std::min(2 * model.experts_per_token, model.experts);
  const std::uint64_t slots = std::min(*wishes.prefetch_size / model.expert_slot, model.experts);
  if (slots == 0) {
    throw ParameterError("prefetch_size", "must hold at least one expert, " +
                                              std::to_string(model.expert_slot) + " bytes");
  }
  return slots;
}

std::uint64_t wished_slots(const ModelBytes& model, const Wishes& wishes) {
  return model.expert_slot > 0 ? wishes.cpu_cache_size.value_or(0) / model.expert_slot : 0;
}

}  // namespace dsfp4::residency::planning
