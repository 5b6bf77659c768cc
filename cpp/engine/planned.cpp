#include "engine/planned.h"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>

#include "dsfp4/error.h"
#include "engine/options.h"

namespace dsfp4::engine {
namespace {

// RAM that a model may take beyond what was there before it.
std::uint64_t with_uncounted(std::uint64_t bytes) { return bytes + memory::kUncountedBytes; }

}  // namespace

Planned::Planned(residency::ModelBytes model, const LoadOptions& options, std::int64_t max_context,
                 const Machine& machine, std::optional<std::uint64_t> vram)
    : device_(options.device), model_(std::move(model)) {
  budgets_.vram = vram;
  const residency::Wishes wishes = engine::wishes_of(options, max_context, vram.has_value());
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
  check_memory_strategy(strategy, device_, budgets_.vram.has_value());
}

residency::Wishes Planned::wishes_of(const MemoryStrategy& strategy) const {
  residency::Wishes wishes = engine::wishes_of(strategy);
  if (!strategy.gpu_reserved) wishes.gpu_reserved = gpu_reserved_;
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
