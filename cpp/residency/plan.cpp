#include "residency/plan.h"

#include <algorithm>
#include <cstdio>
#include <initializer_list>
#include <limits>
#include <utility>
#include <variant>

#include "base/checked.h"
#include "dsfp4/error.h"
#include "ops/ops.h"

namespace dsfp4::residency {
namespace {

constexpr std::uint64_t kMost = std::numeric_limits<std::uint64_t>::max();

// Memory that a plan lacks.
struct Shortage {
  const char* purpose = "";
  std::uint64_t beside_kv = 0;  // bytes from which on it would fit, but the KV cache's
  const char* lower = "";       // what the user gave too much of; empty: max_context
};

constexpr const char* kFloor = "what is always in memory and the smallest buffers for what is not";
constexpr const char* kCache = "cpu_cache_size and what else is in memory";

using Trial = std::variant<Plan, Shortage>;

// The largest number where the sum does not fit.
std::uint64_t sum_of(std::initializer_list<std::uint64_t> parts) {
  std::uint64_t sum = 0;
  for (const std::uint64_t part : parts) sum = checked_add(sum, part).value_or(kMost);
  return sum;
}

std::uint64_t kv_bytes(const ModelBytes& model, std::int64_t tokens) {
  const auto blocks = static_cast<std::uint64_t>(ceil_div(tokens, ops::kKvBlockTokens));
  return checked_mul(blocks, model.kv_block).value_or(kMost);
}

std::uint64_t ram_limit(const Budgets& budgets) {
  return budgets.ram_limit > 0 ? budgets.ram_limit : memory::default_ram_limit(budgets.machine);
}

// RAM that the process may have in all.
std::uint64_t ram_ceiling(const Budgets& budgets) {
  return std::min(ram_limit(budgets), most_ram(budgets.machine));
}

std::string gigabytes(std::uint64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f GB", static_cast<double>(bytes) * 1e-9);
  return text;
}

// ---- refusals

// "max_context to 1024", or nothing where no context would fit.
std::string shorter_context(const ModelBytes& model, std::uint64_t beside_kv,
                            std::uint64_t available) {
  const std::uint64_t room = available - std::min(available, beside_kv);
  const std::uint64_t blocks = model.kv_block > 0 ? room / model.kv_block : 0;
  if (blocks == 0) return "";
  return "max_context to " + std::to_string(blocks * ops::kKvBlockTokens);
}

[[noreturn]] void refuse(const Shortage& shortage, const ModelBytes& model, const Budgets& budgets,
                         std::uint64_t kv) {
  const std::uint64_t ceiling = ram_ceiling(budgets);
  std::string lower = shortage.lower;
  if (lower.empty()) lower = shorter_context(model, shortage.beside_kv, ceiling);
  if (!lower.empty()) lower = ", or lower " + lower;
  std::string advice = "raise ram_limit";
  if (ceiling < ram_limit(budgets)) {
    advice = "more would make the machine swap: free some memory";
  } else if (budgets.ram_limit == 0) {
    advice = "free some memory, or set ram_limit if the machine can spare more";
  }
  throw MemoryLimitError(shortage.purpose, sum_of({shortage.beside_kv, kv}), ceiling,
                         advice + lower);
}

// ---- a model in RAM

// `count` of `layers`, evenly spread.
std::vector<bool> spread(std::size_t count, std::size_t layers) {
  std::vector<bool> chosen(layers);
  for (std::size_t i = 0; i < layers; ++i) {
    chosen[i] = (i + 1) * count / layers > i * count / layers;
  }
  return chosen;
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

// Slots for experts on their way.
std::uint64_t staging_slots(const ModelBytes& model, const Wishes& wishes) {
  if (!wishes.prefetch_size) return std::min(2 * model.experts_per_token, model.experts);
  const std::uint64_t slots = std::min(*wishes.prefetch_size / model.expert_slot, model.experts);
  if (slots == 0) {
    throw ParameterError("prefetch_size", "must hold at least one expert, " +
                                              std::to_string(model.expert_slot) + " bytes");
  }
  return slots;
}

// Slots of the cache that the user asked for.
std::uint64_t wished_slots(const ModelBytes& model, const Wishes& wishes) {
  return model.expert_slot > 0 ? wishes.cpu_cache_size.value_or(0) / model.expert_slot : 0;
}

// Gives the slots what `others` leave of `ceiling`; both count the KV cache. Returns what is
// lacking.
std::optional<Shortage> place_slots(const ModelBytes& model, const Wishes& wishes,
                                    std::uint64_t others, std::uint64_t ceiling, Plan& plan) {
  const std::uint64_t staging = staging_slots(model, wishes);
  const std::uint64_t floor = sum_of({others, staging * model.expert_slot});
  if (floor > ceiling) {
    return Shortage{kFloor, floor - plan.kv_bytes, "prefetch_size"};
  }
  std::uint64_t cached = (ceiling - floor) / model.expert_slot;
  if (wishes.cpu_cache_size) {
    const std::uint64_t wanted = wished_slots(model, wishes);
    if (wanted > cached) {
      return Shortage{kCache, floor + wanted * model.expert_slot - plan.kv_bytes, "cpu_cache_size"};
    }
    cached = wanted;
  }
  plan.cache_slots = static_cast<std::size_t>(std::min(cached, model.experts));
  plan.slots = plan.cache_slots + static_cast<std::size_t>(staging);
  plan.expert_bytes = plan.slots * model.expert_slot;
  return std::nullopt;
}

// All in one memory, with chunks of `step.rows`.
Plan whole_plan(const ModelBytes& model, const Wishes& wishes, const ModelBytes::Step& step) {
  Plan plan;
  plan.chunk = step.rows;
  plan.dense_bytes = model.dense;
  plan.expert_bytes = model.expert_bytes;
  plan.kv_bytes = kv_bytes(model, wishes.max_context);
  plan.step_bytes = step.bytes;
  return plan;
}

// With chunks of `step.rows`.
Trial try_in_ram(const ModelBytes& model, const Budgets& budgets, const Wishes& wishes,
                 const ModelBytes::Step& step) {
  const std::uint64_t ceiling = ram_ceiling(budgets);
  Plan plan = whole_plan(model, wishes, step);
  const std::uint64_t rest = sum_of(
      {budgets.machine.process, memory::kUncountedBytes, model.dense, model.reader, step.bytes});
  const bool cache_holds_all =
      !wishes.cpu_cache_size || *wishes.cpu_cache_size >= model.expert_slot * model.experts;
  const std::uint64_t whole = cache_holds_all ? sum_of({rest, model.expert_bytes}) : kMost;
  const auto finish = [&] {
    plan.ram_bytes =
        sum_of({plan.dense_bytes, plan.expert_bytes, plan.kv_bytes, model.reader, plan.step_bytes});
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
      if (cache > 0) return Shortage{kCache, std::min(rest + staging + cache, whole)};
      return Shortage{kFloor, std::min(rest + staging - saved, whole)};
    }
  }
  plan.dense_bytes -= saved;
  if (plan.tiered) {
    auto lacking = place_slots(model, wishes, sum_of({rest, plan.kv_bytes}) - saved, ceiling, plan);
    if (lacking) {  // with more memory no layer would be streamed
      lacking->beside_kv = std::min(lacking->beside_kv + saved, whole);
      return *lacking;
    }
  }
  return finish();
}

Plan plan_in_ram(const ModelBytes& model, const Budgets& budgets, const Wishes& wishes) {
  const Trial first = try_in_ram(model, budgets, wishes, model.steps.front());
  if (const auto* shortage = std::get_if<Shortage>(&first)) {
    refuse(*shortage, model, budgets, kv_bytes(model, wishes.max_context));
  }
  const Plan& shortest = std::get<Plan>(first);
  if (!shortest.tiered) return shortest;
  // Longer chunks read less, so they come before a larger cache, up to a point.
  for (std::size_t i = model.steps.size(); i-- > 1;) {
    const ModelBytes::Step& step = model.steps[i];
    if (step.bytes > kActivationBytes) continue;
    const Trial trial = try_in_ram(model, budgets, wishes, step);
    const auto* plan = std::get_if<Plan>(&trial);
    if (plan == nullptr) continue;
    const std::size_t price = shortest.cache_slots / (step.bytes > kSmallActivationBytes ? 8 : 2);
    if (plan->cache_slots + price >= shortest.cache_slots &&
        plan->streamed_layers() <= shortest.streamed_layers()) {
      return *plan;
    }
  }
  return shortest;
}

// ---- a model in VRAM

// Of which `vram` bytes are left.
Plan plan_in_vram(const ModelBytes& model, const Budgets& budgets, const Wishes& wishes,
                  std::uint64_t vram) {
  const ModelBytes::Step& step = model.steps.front();
  Plan plan = whole_plan(model, wishes, step);
  plan.load_bytes = sum_of({model.reader, model.load_buffer});
  const std::uint64_t ram =
      sum_of({budgets.machine.process, memory::kUncountedBytes, plan.load_bytes});
  if (ram > ram_ceiling(budgets)) {
    refuse({"what this process has already and the buffers that weights are loaded through", ram},
           {}, budgets, 0);
  }
  const std::uint64_t beside_kv = sum_of({model.dense, model.expert_bytes, step.bytes});
  plan.vram_bytes = sum_of({beside_kv, plan.kv_bytes});
  if (plan.vram_bytes > vram) {
    const std::string lower = shorter_context(model, beside_kv, vram);
    throw MemoryLimitError("the whole model with its KV cache and its buffers", plan.vram_bytes,
                           vram,
                           lower.empty() ? "device cpu leaves on the SSD what does not fit"
                                         : "raise memory_limit, or lower " + lower,
                           "VRAM");
  }
  return plan;
}

std::vector<std::string> warnings_of(const Plan& plan, const Budgets& budgets) {
  std::vector<std::string> warnings;
  const std::uint64_t most = most_ram(budgets.machine);
  if (const std::uint64_t limit = ram_limit(budgets); limit > most) {
    warnings.push_back("ram_limit is " + gigabytes(limit) + ", but only " + gigabytes(most) +
                       " can be had without swapping; a machine that swaps is many times slower");
  }
  if (const std::size_t streamed = plan.streamed_layers(); streamed > 0) {
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
  Plan plan = budgets.vram ? plan_in_vram(model, budgets, wishes, *budgets.vram)
                           : plan_in_ram(model, budgets, wishes);
  plan.warnings = warnings_of(plan, budgets);
  return plan;
}

Plan with_slots(const Plan& plan, const ModelBytes& model, const Budgets& budgets,
                const Wishes& wishes) {
  Plan next = plan;
  const std::uint64_t others = plan.ram_bytes - plan.expert_bytes;
  const std::uint64_t taken = sum_of({budgets.machine.process, memory::kUncountedBytes, others});
  if (const auto lacking = place_slots(model, wishes, taken, ram_ceiling(budgets), next)) {
    refuse(*lacking, model, budgets, plan.kv_bytes);
  }
  next.ram_bytes = others + next.expert_bytes;
  return next;
}

}  // namespace dsfp4::residency
