#include "engine/planned.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <utility>

#include "dsfp4/error.h"

namespace dsfp4::engine {
namespace {

constexpr double kGigabyte = 1e9;
constexpr double kMostGigabytes = 1e6;
constexpr std::int64_t kMostPrefetchLayers = 16;
constexpr std::int64_t kMostCount = std::numeric_limits<std::int32_t>::max();

void check_gigabytes(const std::optional<double>& value, const char* name) {
  if (!value || (*value >= 0.0 && *value <= kMostGigabytes)) return;  // NaN fails both
  throw ParameterError(name, "must be 0 to 1000000 GB, not " + std::to_string(*value));
}

void check_count(const std::optional<std::int64_t>& count, const char* name, const char* what) {
  if (!count || (*count >= 0 && *count <= kMostCount)) return;
  throw ParameterError(name, "must be 0 (none) to " + std::to_string(kMostCount) + " " + what +
                                 " in VRAM, not " + std::to_string(*count));
}

std::optional<std::uint64_t> bytes_of(const std::optional<double>& gigabytes) {
  if (!gigabytes) return std::nullopt;
  return static_cast<std::uint64_t>(std::llround(*gigabytes * kGigabyte));
}

// RAM that a model may take beyond what was there before it.
std::uint64_t with_uncounted(std::uint64_t bytes) { return bytes + memory::kUncountedBytes; }

}  // namespace

void check_memory_config(const MemoryConfig& config) {
  const std::int64_t ahead = config.prefetch_layers.value_or(0);
  if (ahead < 0 || ahead > kMostPrefetchLayers) {
    throw ParameterError("prefetch_layers", "must be 0 (off) to " +
                                                std::to_string(kMostPrefetchLayers) + ", not " +
                                                std::to_string(ahead));
  }
  if (!(config.expert_threshold >= 0.0 && config.expert_threshold <= 1.0)) {
    throw ParameterError("expert_threshold",
                         "must be 0 (exact) to 1, not " + std::to_string(config.expert_threshold));
  }
  if (config.cpu_share && !(*config.cpu_share >= 0.0 && *config.cpu_share <= 1.0)) {
    throw ParameterError("cpu_share", "must be 0 to 1, not " + std::to_string(*config.cpu_share));
  }
}

void check_memory_strategy(const MemoryStrategy& strategy) {
  check_gigabytes(strategy.cpu_cache_size, "cpu_cache_size");
  check_gigabytes(strategy.prefetch_size, "prefetch_size");
  check_gigabytes(strategy.gpu_reserved, "gpu_reserved");
  check_count(strategy.max_experts, "max_experts", "experts");
  check_count(strategy.max_gpu_layers, "max_gpu_layers", "layers");
  check_count(strategy.min_layers, "min_layers", "layers");
}

Planned::Planned(residency::ModelBytes model, const LoadOptions& options, std::int64_t max_context,
                 const Machine& machine, std::optional<std::uint64_t> vram)
    : device_(options.device), model_(std::move(model)) {
  budgets_.vram = vram;
  check_memory_config(options.memory);
  check(options.strategy);
  residency::Wishes wishes = wishes_of(options.strategy);
  wishes.max_context = max_context;
  wishes.prefetch_layers = std::max<std::int64_t>(1, options.memory.prefetch_layers.value_or(1));
  gpu_reserved_ = wishes.gpu_reserved;
  lease_ = machine.account->reserve(
      machine.memory(), [&](const memory::MachineMemory& committed, std::uint64_t leased) {
        budgets_ = {options.ram_limit, committed, vram};
        outside_ = committed.process - leased;
        plan_ = residency::make_plan(model_, budgets_, wishes);
        return with_uncounted(plan_.ram_bytes + plan_.load_bytes);
      });
}

void Planned::check(const MemoryStrategy& strategy) const {
  check_memory_strategy(strategy);
  const auto needs_vram = [&](bool given, const char* name) {
    if (!given || budgets_.vram) return;
    throw ParameterError(name, "limits VRAM, and device '" + device_ + "' uses none");
  };
  needs_vram(strategy.max_experts.has_value(), "max_experts");
  needs_vram(strategy.gpu_reserved.has_value(), "gpu_reserved");
  needs_vram(strategy.max_gpu_layers.has_value(), "max_gpu_layers");
  needs_vram(strategy.min_layers.has_value(), "min_layers");
}

residency::Wishes Planned::wishes_of(const MemoryStrategy& strategy) const {
  residency::Wishes wishes;
  wishes.cpu_cache_size = bytes_of(strategy.cpu_cache_size);
  wishes.prefetch_size = bytes_of(strategy.prefetch_size);
  wishes.max_experts = strategy.max_experts;
  wishes.max_gpu_layers = strategy.max_gpu_layers;
  wishes.min_layers = static_cast<std::uint64_t>(strategy.min_layers.value_or(0));
  wishes.gpu_reserved = bytes_of(strategy.gpu_reserved).value_or(gpu_reserved_);
  return wishes;
}

residency::Plan Planned::plan() const {
  const std::lock_guard lock(mutex_);
  return plan_;
}

void Planned::lease(std::uint64_t bytes) {
  lease_.resize([&](std::uint64_t) { return bytes; });
}

void Planned::loaded() { lease(with_uncounted(plan_.ram_bytes)); }

void Planned::change(const MemoryStrategy& strategy,
                     const std::function<void(const residency::Plan& next)>& apply,
                     std::uint64_t vram) {
  check(strategy);
  const residency::Wishes wishes = wishes_of(strategy);
  residency::Plan next;
  const std::uint64_t before = lease_.bytes();
  lease_.resize([&](std::uint64_t others) {
    residency::Budgets budgets = budgets_;
    if (budgets.vram) budgets.vram = std::min(*budgets.vram, vram);
    memory::MachineMemory& machine = budgets.machine;
    const std::uint64_t both = residency::most_ram(machine);
    machine.process = outside_ + others;
    machine.available = both - std::min(both, machine.process);
    next = residency::with_slots(plan_, model_, budgets, wishes);
    return std::max(before, with_uncounted(next.ram_bytes));
  });
  try {
    apply(next);
  } catch (...) {
    lease(before);
    throw;
  }
  lease(with_uncounted(next.ram_bytes));
  gpu_reserved_ = wishes.gpu_reserved;
  const std::lock_guard lock(mutex_);
  plan_ = std::move(next);
}

void check_result(std::uint64_t bytes, std::uint64_t ram_limit,
                  const memory::MachineMemory& machine) {
  std::uint64_t room = machine.available;
  if (ram_limit > 0) room = std::min(room, ram_limit - std::min(ram_limit, machine.process));
  room = std::max(room, memory::kUncountedBytes);
  if (bytes <= room) return;
  throw MemoryLimitError("the results of forward() for all tokens", bytes, room,
                         "run fewer tokens at a time (dsfp4 eval: a smaller --window), or take the "
                         "logits with forward_windows()");
}

}  // namespace dsfp4::engine
