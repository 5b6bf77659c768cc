#include "residency/plan.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <utility>
#include <variant>

#include "base/checked.h"
#include "base/units.h"
#include "dsfp4/error.h"
#include "ops/ops.h"

namespace dsfp4::residency {
namespace {

constexpr std::uint64_t kMost = std::numeric_limits<std::uint64_t>::max();

// Memory that a plan lacks.
struct Shortage {
  const char* purpose = "";
  std::uint64_t needed = 0;  // bytes from which on it would fit
  std::string lower;         // what may be lowered instead; empty: nothing helps
  bool vram = false;
};

constexpr const char* kFloor = "what is always in memory and the smallest buffers for what is not";
constexpr const char* kCache = "cpu_cache_size and what else is in memory";
constexpr const char* kLoading =
    "what this process has already and the buffers that weights are loaded through";
constexpr const char* kDeviceFloor =
    "the dense weights, the KV cache, a step and a few slots for experts";
constexpr const char* kDeviceCache = "max_experts and what else is in VRAM";
constexpr const char* kDeviceWhole = "the whole model with its KV cache and its buffers";

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

// VRAM that there is for the model and for gpu_reserved.
std::uint64_t vram_of(const Budgets& budgets) { return budgets.vram.value_or(0); }

// ---- refusals

// "max_context to 1024", or nothing where no context would fit.
std::string shorter_context(const ModelBytes& model, std::uint64_t beside_kv,
                            std::uint64_t available) {
  const std::uint64_t room = available - std::min(available, beside_kv);
  const std::uint64_t blocks = model.kv_block > 0 ? room / model.kv_block : 0;
  if (blocks == 0) return "";
  return "max_context to " + std::to_string(blocks * ops::kKvBlockTokens);
}

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
  throw MemoryLimitError(shortage.purpose, shortage.needed, ceiling, advice + lower);
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

// Neither cache is to be smaller than all experts.
bool wants_all(const ModelBytes& model, const Wishes& wishes) {
  return wishes.max_experts.value_or(kMost) >= model.experts &&
         wishes.cpu_cache_size.value_or(kMost) >= model.expert_slot * model.experts;
}

// Slots of the cache that the user asked for.
std::uint64_t wished_slots(const ModelBytes& model, const Wishes& wishes) {
  return model.expert_slot > 0 ? wishes.cpu_cache_size.value_or(0) / model.expert_slot : 0;
}

// Gives the slots what `others` leave of `ceiling`, in RAM. Returns what is lacking.
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

// All in one memory, with chunks of `step.rows`.
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
    const std::uint64_t loading = sum_of(
        {budgets.machine.process, memory::kUncountedBytes, plan.ram_bytes, plan.load_bytes});
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

using Attempt = Trial (*)(const ModelBytes&, const Budgets&, const Wishes&,
                          const ModelBytes::Step&);

// The plan that `attempt` makes with the chunks that pay.
Trial best_plan(Attempt attempt, const ModelBytes& model, const Budgets& budgets,
                const Wishes& wishes) {
  const Trial first = attempt(model, budgets, wishes, model.steps.front());
  if (std::holds_alternative<Shortage>(first)) return first;
  const Plan& shortest = std::get<Plan>(first);
  if (!shortest.tiered) return shortest;
  // Longer chunks read less, so they come before a larger cache, up to a point.
  for (std::size_t i = model.steps.size(); i-- > 1;) {
    const ModelBytes::Step& step = model.steps[i];
    if (step.bytes > kActivationBytes) continue;
    const Trial trial = attempt(model, budgets, wishes, step);
    const auto* plan = std::get_if<Plan>(&trial);
    if (plan == nullptr) continue;
    const std::size_t share = step.bytes > kSmallActivationBytes ? 8 : 2;
    const auto leaves_most = [&](std::size_t before, std::size_t after) {
      return after + before / share >= before;
    };
    if (leaves_most(shortest.cache_slots, plan->cache_slots) &&
        leaves_most(shortest.device_cache_slots, plan->device_cache_slots) &&
        plan->streamed_layers() <= shortest.streamed_layers()) {
      return *plan;
    }
  }
  return shortest;
}

// ---- a model in VRAM

// All of it, with what loading takes of RAM.
Plan whole_in_vram(const ModelBytes& model, const Wishes& wishes) {
  Plan plan = whole_plan(model, wishes, model.steps.front());
  plan.load_bytes = sum_of({model.reader, model.load_buffer});
  plan.vram_bytes = sum_of({plan.dense_bytes, plan.expert_bytes, plan.kv_bytes, plan.step_bytes});
  return plan;
}

// Bytes of the experts that are to be cached in VRAM.
std::uint64_t wished_device_bytes(const ModelBytes& model, const Wishes& wishes) {
  return std::min(wishes.max_experts.value_or(0), model.experts) * model.device_slot;
}

// Gives the VRAM slots what `others` leave of `ceiling`. Returns what is lacking.
std::optional<Shortage> place_device_slots(const ModelBytes& model, const Wishes& wishes,
                                           std::uint64_t others, std::uint64_t ceiling,
                                           Plan& plan) {
  const std::uint64_t floor =
      sum_of({wishes.gpu_reserved, others, kDeviceRing * model.device_slot});
  const std::uint64_t wished = wished_device_bytes(model, wishes);
  const std::uint64_t needed = sum_of({floor, wished});
  if (floor > ceiling) return Shortage{wished > 0 ? kDeviceCache : kDeviceFloor, needed, "", true};
  std::uint64_t cached = (ceiling - floor) / model.device_slot;
  if (needed > ceiling) {
    return Shortage{kDeviceCache, needed, "max_experts to " + std::to_string(cached), true};
  }
  if (wishes.max_experts) cached = *wishes.max_experts;
  plan.device_cache_slots = static_cast<std::size_t>(std::min(cached, model.experts));
  plan.device_slots = plan.device_cache_slots + kDeviceRing;
  plan.device_expert_bytes = plan.device_slots * model.device_slot;
  return std::nullopt;
}

// `lacking` of place_device_slots() for a model that is being loaded, with what could be lowered.
Shortage device_shortage(const ModelBytes& model, const Wishes& wishes, std::uint64_t vram,
                         const Plan& plan, Shortage lacking) {
  const std::uint64_t least = sum_of(
      {wishes.gpu_reserved, plan.dense_bytes, plan.step_bytes, kDeviceRing * model.device_slot});
  const std::uint64_t wished = wished_device_bytes(model, wishes);
  // A few slots may take more than all experts of a tiny model.
  const std::uint64_t whole =
      wants_all(model, wishes)
          ? sum_of({wishes.gpu_reserved, model.dense, model.expert_bytes, plan.step_bytes})
          : kMost;
  lacking.needed = std::min(lacking.needed, sum_of({whole, plan.kv_bytes}));
  if (!lacking.lower.empty()) return lacking;
  lacking.lower = shorter_context(model, std::min(sum_of({least, wished}), whole), vram);
  if (lacking.lower.empty() && wished > 0) {
    const std::string shorter = shorter_context(model, least, vram);
    if (!shorter.empty()) lacking.lower = "max_experts to 0 and " + shorter;
  }
  return lacking;
}

// In VRAM, RAM and the files, with chunks of `step.rows`.
Trial try_tiers(const ModelBytes& model, const Budgets& budgets, const Wishes& wishes,
                const ModelBytes::Step& step) {
  Plan plan = whole_plan(model, wishes, step);
  plan.tiered = true;
  plan.embedding_in_ram = model.embedding > 0;
  plan.dense_bytes -= model.embedding;
  plan.embedding_bytes = plan.embedding_in_ram ? model.host_embedding : 0;
  plan.host_step_bytes = step.host_bytes;
  const std::uint64_t in_vram = sum_of({plan.dense_bytes, plan.kv_bytes, plan.step_bytes});
  if (auto lacking = place_device_slots(model, wishes, in_vram, vram_of(budgets), plan)) {
    return device_shortage(model, wishes, vram_of(budgets), plan, std::move(*lacking));
  }
  plan.vram_bytes = in_vram + plan.device_expert_bytes;

  const std::uint64_t ceiling = ram_ceiling(budgets);
  const std::uint64_t always = sum_of({plan.embedding_bytes, model.reader});
  const std::uint64_t rest = sum_of({budgets.machine.process, memory::kUncountedBytes, always});
  const std::uint64_t loading = sum_of({rest, model.load_buffer});
  if (auto lacking = place_slots(model, wishes, sum_of({rest, step.host_bytes}), ceiling, plan)) {
    lacking->needed = std::max(lacking->needed, loading);
    return *lacking;
  }
  if (loading > ceiling) return Shortage{kLoading, loading, ""};
  const std::uint64_t later = plan.expert_bytes + plan.host_step_bytes;
  plan.ram_bytes = always + later;
  plan.load_bytes = model.load_buffer - std::min(model.load_buffer, later);
  return plan;
}

Trial try_in_vram(const ModelBytes& model, const Budgets& budgets, const Wishes& wishes) {
  Plan whole = whole_in_vram(model, wishes);
  const std::uint64_t needed = sum_of({wishes.gpu_reserved, whole.vram_bytes});
  if (needed <= vram_of(budgets) && wants_all(model, wishes)) {
    const std::uint64_t ram =
        sum_of({budgets.machine.process, memory::kUncountedBytes, whole.load_bytes});
    if (ram > ram_ceiling(budgets)) return Shortage{kLoading, ram, ""};
    return whole;
  }
  if (model.experts == 0) {
    const std::uint64_t beside_kv =
        sum_of({wishes.gpu_reserved, whole.dense_bytes, whole.step_bytes});
    return Shortage{kDeviceWhole, needed, shorter_context(model, beside_kv, vram_of(budgets)),
                    true};
  }
  return best_plan(try_tiers, model, budgets, wishes);
}

// In the first formats that fit.
Trial plan_in_vram(const ModelBytes& model, const Budgets& budgets, const Wishes& wishes) {
  Trial trial = try_in_vram(model, budgets, wishes);
  ModelBytes smaller = model;
  for (const ModelBytes::Converted& converted : model.converted) {
    const auto* shortage = std::get_if<Shortage>(&trial);
    if (shortage == nullptr || !shortage->vram) break;
    smaller.formats = converted.formats;
    smaller.dense = converted.dense;
    smaller.layers = converted.layers;
    trial = try_in_vram(smaller, budgets, wishes);
  }
  return trial;
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
