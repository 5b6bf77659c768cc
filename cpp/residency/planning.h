// Parts of make_plan() that a model in RAM and one in VRAM share.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "residency/plan.h"

namespace dsfp4::residency::planning {

inline constexpr std::uint64_t kMost = std::numeric_limits<std::uint64_t>::max();

/// Memory that a plan lacks.
struct Shortage {
  const char* purpose = "";
  std::uint64_t needed = 0;  // bytes from which on it would fit
  std::string lower;         // what may be lowered instead; empty: nothing helps
  bool vram = false;
  std::string raise = {};  // what may be raised instead
};

inline constexpr const char* kFloor =
    "what is always in memory and the smallest buffers for what is not";
inline constexpr const char* kCache = "cpu_cache_size and what else is in memory";
inline constexpr const char* kLoading =
    "what this process has already and the buffers that weights are loaded through";

using Trial = std::variant<Plan, Shortage>;
/// With chunks of `step.rows`.
using Attempt = Trial (*)(const ModelBytes&, const Budgets&, const Wishes&,
                          const ModelBytes::Step& step);

/// The largest number where the sum does not fit.
std::uint64_t sum_of(std::initializer_list<std::uint64_t> parts);
/// The user's, or the default.
std::uint64_t ram_limit(const Budgets& budgets);
/// RAM that the process may have in all.
std::uint64_t ram_ceiling(const Budgets& budgets);
/// VRAM that there is for the model and for gpu_reserved.
std::uint64_t vram_of(const Budgets& budgets);
/// "max_context to 1024", or nothing where no context would fit.
std::string shorter_context(const ModelBytes& model, std::uint64_t beside_kv,
                            std::uint64_t available);
/// `count` of `layers`, evenly spread.
std::vector<bool> spread(std::size_t count, std::size_t layers);
/// Neither cache is to be smaller than all experts, and all layers stay.
bool wants_all(const ModelBytes& model, const Wishes& wishes);
/// All in one memory, with chunks of `step.rows`.
Plan whole_plan(const ModelBytes& model, const Wishes& wishes, const ModelBytes::Step& step);
/// Slots for experts on their way. Throws ParameterError for a prefetch_size below one.
std::uint64_t staging_slots(const ModelBytes& model, const Wishes& wishes);
/// Slots of the cache that the user asked for.
std::uint64_t wished_slots(const ModelBytes& model, const Wishes& wishes);
/// Gives the slots what `others` leave of `ceiling`, in RAM. Returns what is lacking.
std::optional<Shortage> place_slots(const ModelBytes& model, const Wishes& wishes,
                                    std::uint64_t others, std::uint64_t ceiling, Plan& plan);
/// The plan that `attempt` makes with the chunks that pay.
Trial best_plan(Attempt attempt, const ModelBytes& model, const Budgets& budgets,
                const Wishes& wishes);

// Of plan_vram.cpp:

/// Gives the VRAM slots what `others` leave of `ceiling`. Returns what is lacking.
std::optional<Shortage> place_device_slots(const ModelBytes& model, const Wishes& wishes,
                                           std::uint64_t others, std::uint64_t ceiling, Plan& plan);
/// A model that a GPU holds: in the first formats that fit, else with layers streamed.
Trial plan_in_vram(const ModelBytes& model, const Budgets& budgets, const Wishes& wishes);

}  // namespace dsfp4::residency::planning
