// A plan together with the memory that it was granted: made when a model is loaded, changed while
// it lives.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "dsfp4/model.h"
#include "engine/rates.h"
#include "memory/account.h"
#include "memory/limits.h"
#include "ops/ops.h"
#include "residency/plan.h"
#include "storage/reader.h"

namespace dsfp4::engine {

/// The machine that a model is loaded on. Tests replace it.
struct Machine {
  storage::ReaderOptions reading;
  std::function<memory::MachineMemory()> memory = memory::machine_memory;
  memory::Account* account = &memory::ram_account();
  /// None: what LoadOptions::device names.
  std::function<std::unique_ptr<ops::Ops>()> make_ops = nullptr;
  RateLimits rate_limits = {};
};

class Planned {
 public:
  /// Plans a model of `model` bytes and reserves its RAM; `vram`: what a GPU that is to hold it can
  /// still give. Throws as make_plan(), and ParameterError for an option out of range.
  Planned(residency::ModelBytes model, const LoadOptions& options, std::int64_t max_context,
          const Machine& machine, std::optional<std::uint64_t> vram);

  Planned(const Planned&) = delete;
  Planned& operator=(const Planned&) = delete;

  /// Throws ParameterError for an option out of range, or of memory that the device does not have.
  void check(const MemoryStrategy& strategy) const;
  /// At any time, from any thread.
  residency::Plan plan() const;
  /// The model is loaded: what only that took is given back.
  void loaded();
  /// Other slots of RAM and VRAM, within what this and the other models of the process leave now;
  /// what is not given is planned, but gpu_reserved stays. The model must be tiered. Calls `apply`
  /// with the new plan before it holds; what `apply` throws leaves everything as it was.
  /// `vram`: what a GPU could give to the whole model now.
  void change(const MemoryStrategy& strategy,
              const std::function<void(const residency::Plan& next)>& apply,
              std::uint64_t vram = std::numeric_limits<std::uint64_t>::max());

 private:
  residency::Wishes wishes_of(const MemoryStrategy& strategy) const;
  void lease(std::uint64_t bytes);

  std::string device_;  // LoadOptions::device
  residency::ModelBytes model_;
  residency::Budgets budgets_;  // as they were when the model was loaded
  std::uint64_t outside_ = 0;   // bytes of the process then, but the other models'
  std::uint64_t gpu_reserved_ = 0;
  mutable std::mutex mutex_;  // of plan_
  residency::Plan plan_;
  memory::Account::Lease lease_;
};

/// Refuses results of forward() that take `bytes` with MemoryLimitError, if that is more than
/// `ram_limit` (in bytes, 0: none) leaves or the machine has. `machine` is what the account says.
/// memory::kUncountedBytes are always there.
void check_result(std::uint64_t bytes, std::uint64_t ram_limit,
                  const memory::MachineMemory& machine);

}  // namespace dsfp4::engine
