#include "residency/plan.h"

#include <algorithm>
#include <utility>

#include "base/units.h"
#include "dsfp4/error.h"
#include "residency/planning.h"

namespace dsfp4::residency {

using planning::best_plan;
using planning::kCache;
using planning::kFloor;
using planning::kLoading;
using planning::kMost;
using planning::place_device_slots;
using planning::place_slots;
using planning::plan_in_vram;
using planning::ram_ceiling;
using planning::ram_limit;
using planning::Shortage;
using planning::shorter_context;
using planning::spread;
using planning::staging_slots;
using planning::sum_of;
using planning::Trial;
using planning::vram_of;
using planning::wants_all;
using planning::whole_plan;
using planning::wished_slots;

namespace {

[[noreturn]] void refuse(const Shortage& shortage, const Budgets& budgets, const Wishes& wishes) {
  std::string lower = shortage.lower;
  if (shortage.vram && wishes.gpu_reserved > 0 &&
      shortage.needed - std::min(shortage.needed, wishes.gpu_reserved) <= vram_of(budgets)) {
    lower += lower.empty() ? "gpu_reserved" : " or gpu_reserved";
  }
  if (!lower.empty()) lower = ", or lower " + lower;
  if (shortage.vram) {
    throw MemoryLimitError(
        shortage.purpose, shortage.needed, vram_of(budgets),
        "raise memory_limit" + lower + "; device cpu leaves on the SSD what does not fit", "VRAM");
  }
  const std::uint64_t ceiling = ram_ceiling(budgets);
  std::string advice = "raise ram_limit";
  if (ceiling < ram_limit(budgets)) {
    advice = "more would make the machine swap: free some memory";
  } else if (budgets.ram_limit == 0) {
    advice = "free some memory, or set ram_limit if the machine can spare more";
  }
  if (!shortage.raise.empty()) advice += ", or raise " + shortage.raise;
  throw MemoryLimitError(shortage.purpose, shortage.needed, ceiling, advice + lower);
}

// Streams as few layers as make room for `lacking` bytes, or all where even that is too little.
// Returns what is saved; 0 if the buffers take more.
std::uint64_t stream_layers(const ModelBytes& model, std::size_t buffers, std::uint64_t lacking,
                            Plan& plan) {
  const std::size_t layers = model.layers.size();
  std::uint64_t saved = 0;
  for (std::size_t count = 1; count <= layers && saved < lacking; ++count) {
    plan.streamed = spread(count, layers);
    plan.layer_buffers = buffers;
    saved = 0;
    for (std::size_t i = 0; i < layers; ++i) saved += plan.streamed[i] ? model.layers[i] : 0;
    saved -= std::min(saved, buffers * model.layer_buffer);
  }
  return saved;
}

// With chunks of `step.rows`.
Trial try_in_ram(const ModelBytes& model, const Budgets& budgets, const Wishes& wishes,
                 const ModelBytes::Step& step) {
  const std::uint64_t ceiling = ram_ceiling(budgets);
  Plan plan = whole_plan(model, wishes, step);
  const std::uint64_t rest = sum_of(
      {budgets.machine.process, memory::kUncountedBytes, model.dense, model.reader, step.bytes});
  const std::uint64_t whole = wants_all(model, wishes) ? sum_of({rest, model.expert_bytes}) : kMost;
  const auto lacks = [&](const char* purpose, std::uint64_t beside_kv) {
    return Shortage{purpose, sum_of({beside_kv, plan.kv_bytes}),
                    shorter_context(model, beside_kv, ceiling)};
  };
  const auto finish = [&]() -> Trial {
    const std::uint64_t slots = plan.tiered ? plan.expert_bytes : 0;
    const std::uint64_t later = sum_of({slots, plan.kv_bytes, plan.step_bytes});
    plan.ram_bytes =
        sum_of({plan.dense_bytes, plan.expert_bytes, plan.kv_bytes, model.reader, plan.step_bytes});
    plan.load_bytes = model.load_buffer - std::min(model.load_buffer, later);
    const std::uint64_t loading =
        sum_of({budgets.machine.process, memory::kUncountedBytes, plan.ram_bytes, plan.load_bytes});
    if (loading > ceiling) return Shortage{kLoading, loading, ""};
    return plan;
  };
  if (sum_of({whole, plan.kv_bytes}) <= ceiling) return finish();

  plan.tiered = model.experts > 0;
  const std::uint64_t staging = plan.tiered ? staging_slots(model, wishes) * model.expert_slot : 0;
  std::uint64_t saved = 0;
  if (const std::uint64_t floor = sum_of({rest, staging, plan.kv_bytes}); floor > ceiling) {
    const auto buffers = static_cast<std::size_t>(1 + wishes.prefetch_layers);
    saved = stream_layers(model, buffers, floor - ceiling, plan);
    if (floor - saved > ceiling) {
      // No layer is streamed for the sake of a cache, so one that was asked for needs them all.
      const std::uint64_t cache = wished_slots(model, wishes) * model.expert_slot;
      if (cache > 0) return lacks(kCache, std::min(rest + staging + cache, whole));
      return lacks(kFloor, std::min(rest + staging - saved, whole));
    }
  }
  plan.dense_bytes -= saved;
  if (plan.tiered) {
    auto lacking = place_slots(model, wishes, sum_of({rest, plan.kv_bytes}) - saved, ceiling, plan);
    if (lacking) {  // with more memory no layer would be streamed
      lacking->needed = std::min(lacking->needed + saved, sum_of({whole, plan.kv_bytes}));
      return *lacking;
    }
  }
  return finish();
}

std::vector<std::string> warnings_of(const Plan& plan, const Budgets& budgets) {
  std::vector<std::string> warnings;
  const std::uint64_t most = most_ram(budgets.machine);
  if (const std::uint64_t limit = ram_limit(budgets); limit > most) {
    warnings.push_back("ram_limit is " + gigabytes(limit) + ", but only " + gigabytes(most) +
                       " can be had without swapping; a machine that swaps is many times slower");
  }
  const std::size_t streamed = plan.streamed_layers();
  if (streamed > 0 && budgets.vram) {
    warnings.push_back("the dense weights of " + std::to_string(streamed) + " of " +
                       std::to_string(plan.streamed.size()) + " layers, " +
                       gigabytes(plan.staged_bytes) +
                       ", lie in RAM and are copied to VRAM for each token; a larger memory_limit "
                       "or max_gpu_layers, or a shorter max_context, keeps more there");
  } else if (streamed > 0) {
    warnings.push_back("RAM does not hold the dense weights of " + std::to_string(streamed) +
                       " of " + std::to_string(plan.streamed.size()) +
                       " layers: they are read again for each token, which is slower; a larger "
                       "ram_limit or a shorter max_context holds more");
  }
  return warnings;
}

}  // namespace

std::uint64_t most_ram(const memory::MachineMemory& machine) {
  return sum_of({machine.process, machine.available});
}

std::size_t Plan::streamed_layers() const {
  return static_cast<std::size_t>(std::ranges::count(streamed, true));
}

Plan make_plan(const ModelBytes& model, const Budgets& budgets, const Wishes& wishes) {
  Trial trial = budgets.vram ? plan_in_vram(model, budgets, wishes)
                             : best_plan(try_in_ram, model, budgets, wishes);
  if (const auto* shortage = std::get_if<Shortage>(&trial)) refuse(*shortage, budgets, wishes);
  Plan plan = std::get<Plan>(std::move(trial));
  plan.warnings = warnings_of(plan, budgets);
  return plan;
}

Plan with_slots(const Plan& plan, const ModelBytes& model, const Budgets& budgets,
                const Wishes& wishes) {
  Plan next = plan;
  if (budgets.vram) {
    const std::uint64_t others = plan.vram_bytes - plan.device_expert_bytes;
    const auto lacking = place_device_slots(model, wishes, others, vram_of(budgets), next);
    if (lacking) refuse(*lacking, budgets, wishes);
    next.vram_bytes = others + next.device_expert_bytes;
  }
  const std::uint64_t others = plan.ram_bytes - plan.expert_bytes;
  const std::uint64_t taken = sum_of({budgets.machine.process, memory::kUncountedBytes, others});
  const auto lacking = place_slots(model, wishes, taken, ram_ceiling(budgets), next);
  if (lacking) refuse(*lacking, budgets, wishes);
  next.ram_bytes = others + next.expert_bytes;
  return next;
}

}  // namespace dsfp4::residency
