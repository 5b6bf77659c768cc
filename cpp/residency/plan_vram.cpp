// A model that a GPU holds, alone or beside RAM and the files.
#include <algorithm>
#include <utility>

#include "dsfp4/error.h"
#include "residency/planning.h"

namespace dsfp4::residency::planning {
namespace {

constexpr const char* kDeviceFloor =
    "the dense weights, the KV cache, a step and a few slots for experts";
constexpr const char* kDeviceCache = "max_experts and what else is in VRAM";
constexpr const char* kDeviceWhole = "the whole model with its KV cache and its buffers";

// Bytes of the experts that are to be cached in VRAM.
std::uint64_t wished_device_bytes(const ModelBytes& model, const Wishes& wishes) {
  return std::min(wishes.max_experts.value_or(0), model.experts) * model.device_slot;
}

// All of it, with what loading takes of RAM, and the longest chunks that fit: an expert has few
// rows of a short one.
Plan whole_in_vram(const ModelBytes& model, const Budgets& budgets, const Wishes& wishes) {
  Plan plan = whole_plan(model, wishes, model.steps.front());
  const std::uint64_t others =
      sum_of({wishes.gpu_reserved, plan.dense_bytes, plan.expert_bytes, plan.kv_bytes});
  for (const ModelBytes::Step& step : model.steps) {
    if (step.bytes > kSmallActivationBytes || sum_of({others, step.bytes}) > vram_of(budgets)) {
      continue;
    }
    plan.chunk = step.rows;
    plan.step_bytes = step.bytes;
  }
  plan.load_bytes = sum_of({model.reader, model.load_buffer});
  plan.vram_bytes = sum_of({plan.dense_bytes, plan.expert_bytes, plan.kv_bytes, plan.step_bytes});
  return plan;
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

// Leaves `count` layers' dense weights in RAM. Those that are larger than the last one, which has
// experts, come last: buffers are of the largest one's size.
void stage_layers(const ModelBytes& model, const Wishes& wishes, std::size_t count, Plan& plan) {
  const std::size_t layers = model.layers.size();
  std::vector<std::size_t> candidates;
  candidates.reserve(layers);
  for (std::size_t i = 0; i < layers; ++i) {
    if (model.layers[i] <= model.layers.back()) candidates.push_back(i);
  }
  plan.streamed.assign(layers, false);
  if (count > candidates.size()) {
    plan.streamed = spread(count, layers);
  } else {
    const std::vector<bool> chosen = spread(count, candidates.size());
    for (std::size_t i = 0; i < candidates.size(); ++i) plan.streamed[candidates[i]] = chosen[i];
  }
  plan.staged_bytes = plan.layer_buffer_bytes = 0;
  for (std::size_t i = 0; i < layers; ++i) {
    if (!plan.streamed[i]) continue;
    plan.staged_bytes += model.layers[i];
    plan.layer_buffer_bytes = std::max(plan.layer_buffer_bytes, model.layers[i]);
  }
  plan.layer_buffers = std::min(static_cast<std::size_t>(1 + wishes.prefetch_layers), count - 1);
}

// In VRAM, RAM and the files, with chunks of `step.rows`, and `count` layers streamed to VRAM.
Trial try_tiers_with(const ModelBytes& model, const Budgets& budgets, const Wishes& wishes,
                     const ModelBytes::Step& step, std::size_t count) {
  Plan plan = whole_plan(model, wishes, step);
  plan.tiered = true;
  plan.embedding_in_ram = model.embedding > 0;
  plan.dense_bytes -= model.embedding;
  plan.embedding_bytes = plan.embedding_in_ram ? model.host_embedding : 0;
  plan.host_step_bytes = step.host_bytes;
  if (count > 0) {
    stage_layers(model, wishes, count, plan);
    plan.dense_bytes -= plan.staged_bytes;
    plan.dense_bytes += plan.layer_buffers * plan.layer_buffer_bytes;
  }
  const std::uint64_t in_vram = sum_of({plan.dense_bytes, plan.kv_bytes, plan.step_bytes});
  if (auto lacking = place_device_slots(model, wishes, in_vram, vram_of(budgets), plan)) {
    return device_shortage(model, wishes, vram_of(budgets), plan, std::move(*lacking));
  }
  plan.vram_bytes = in_vram + plan.device_expert_bytes;

  const std::uint64_t ceiling = ram_ceiling(budgets);
  const std::uint64_t always = sum_of({plan.embedding_bytes, plan.staged_bytes, model.reader});
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

// Fewer layers than this fill their buffers, of which there are two at least, and save nothing.
constexpr std::uint64_t kFewestStreamed = 3;

// Of so many layers that may be streamed, and have to be.
struct StreamedCount {
  std::size_t least = 0, most = 0;
};

StreamedCount streamed_count(const ModelBytes& model, const Wishes& wishes) {
  const std::uint64_t layers = model.layers.size();
  const std::uint64_t stay = wishes.max_gpu_layers.value_or(kMost);
  if (stay < wishes.min_layers) {
    throw ParameterError("min_layers", "must be at most max_gpu_layers, " + std::to_string(stay) +
                                           ", not " + std::to_string(wishes.min_layers));
  }
  StreamedCount count;
  count.most = layers - std::min(layers, wishes.min_layers);
  count.least = layers - std::min(layers, stay);
  if (count.least == 0) return count;
  count.least = std::max<std::size_t>(count.least, kFewestStreamed);
  if (count.least <= count.most) return count;
  std::string refusal = "must be at least " + std::to_string(layers) + ", all layers";
  if (layers >= kFewestStreamed) {
    refusal += ", or min_layers at most " + std::to_string(layers - kFewestStreamed);
  }
  throw ParameterError("max_gpu_layers", refusal + ": fewer than " +
                                             std::to_string(kFewestStreamed) +
                                             " streamed layers fill their buffers and save "
                                             "nothing");
}

// With as few layers streamed as possible.
Trial try_tiers(const ModelBytes& model, const Budgets& budgets, const Wishes& wishes,
                const ModelBytes::Step& step) {
  const auto [least, most] = streamed_count(model, wishes);
  Trial best = try_tiers_with(model, budgets, wishes, step, least);
  for (std::size_t count = std::max(least + 1, kFewestStreamed); count <= most; ++count) {
    const auto* lacking = std::get_if<Shortage>(&best);
    if (lacking == nullptr || !lacking->vram) break;
    Trial next = try_tiers_with(model, budgets, wishes, step, count);
    const auto* other = std::get_if<Shortage>(&next);
    if (other == nullptr || !other->vram || other->needed < lacking->needed) best = std::move(next);
  }
  return best;
}

// No more than max_gpu_layers asks for.
Trial try_tiers_as_wished(const ModelBytes& model, const Budgets& budgets, const Wishes& wishes,
                          const ModelBytes::Step& step) {
  return try_tiers_with(model, budgets, wishes, step, streamed_count(model, wishes).least);
}

Trial try_in_vram(Attempt in_tiers, const ModelBytes& model, const Budgets& budgets,
                  const Wishes& wishes) {
  Plan whole = whole_in_vram(model, budgets, wishes);
  const std::uint64_t needed = sum_of({wishes.gpu_reserved, whole.vram_bytes});
  if (needed <= vram_of(budgets) && wants_all(model, wishes)) {
    const std::uint64_t ram =
        sum_of({budgets.machine.process, memory::kUncountedBytes, whole.load_bytes});
    if (ram > ram_ceiling(budgets)) return Shortage{kLoading, ram, ""};
    return whole;
  }
  if (model.experts == 0) {
    if (!wants_all(model, wishes)) {
      throw ParameterError("max_gpu_layers", "must be at least " +
                                                 std::to_string(model.layers.size()) +
                                                 ", all layers: a model without routed experts "
                                                 "lies in VRAM whole");
    }
    const std::uint64_t beside_kv =
        sum_of({wishes.gpu_reserved, whole.dense_bytes, whole.step_bytes});
    return Shortage{kDeviceWhole, needed, shorter_context(model, beside_kv, vram_of(budgets)),
                    true};
  }
  return best_plan(in_tiers, model, budgets, wishes);
}

// In the first formats that fit the shortest chunks with no more layers streamed than asked for,
// else in the last; then with as many layers streamed as it takes, or as pay.
Trial in_first_formats_that_fit(const ModelBytes& model, const Budgets& budgets,
                                const Wishes& wishes) {
  ModelBytes smaller = model;
  Trial trial = try_in_vram(try_tiers_as_wished, smaller, budgets, wishes);
  const auto lacks_vram = [&] {
    const auto* shortage = std::get_if<Shortage>(&trial);
    return shortage != nullptr && shortage->vram;
  };
  for (const ModelBytes::Converted& converted : model.converted) {
    if (!lacks_vram()) break;
    smaller.formats = converted.formats;
    smaller.dense = converted.dense;
    smaller.layers = converted.layers;
    trial = try_in_vram(try_tiers_as_wished, smaller, budgets, wishes);
  }
  return try_in_vram(try_tiers, smaller, budgets, wishes);
}

}  // namespace

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

Trial plan_in_vram(const ModelBytes& model, const Budgets& budgets, const Wishes& wishes) {
  Trial trial = in_first_formats_that_fit(model, budgets, wishes);
  auto* const lacking = std::get_if<Shortage>(&trial);
  if (lacking == nullptr) return trial;
  const auto loads_with = [&](const Wishes& other) {
    return std::holds_alternative<Plan>(in_first_formats_that_fit(model, budgets, other));
  };
  Wishes freer = wishes;
  if (lacking->vram && wishes.min_layers > 0) {
    freer.min_layers = 0;
    if (loads_with(freer))
      lacking->lower += lacking->lower.empty() ? "min_layers" : " or min_layers";
  }
  if (!lacking->vram && wishes.max_gpu_layers) {
    freer.max_gpu_layers.reset();
    if (loads_with(freer)) lacking->raise = "max_gpu_layers";
  }
  return trial;
}

}  // namespace dsfp4::residency::planning
