// The residency of an engine's weights, put together: the plan, the store and the runner of
// experts, the stream of layers, and what is remembered from run to run.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

#include "base/trace.h"
#include "checkpoint/config.h"
#include "dsfp4/model.h"
#include "engine/loader.h"
#include "memory/limits.h"
#include "model/spec.h"
#include "residency/expert_store.h"
#include "residency/layer_stream.h"
#include "residency/plan.h"
#include "residency/resident_experts.h"
#include "residency/tiered_experts.h"
#include "residency/warm_start.h"

namespace dsfp4::engine {

/// Throws ParameterError for an option out of range.
void check_memory_config(const MemoryConfig& config);
void check_memory_strategy(const MemoryStrategy& strategy);

/// The plan for a checkpoint beside which `others` bytes are taken (KV cache, scratch, staging).
/// Its total counts what the process has already, too. Throws MemoryLimitError with the least
/// ram_limit.
residency::RamPlan plan_tiers(const checkpoint::ModelConfig& config, const LoadOptions& options,
                              const WeightSizes& sizes, std::uint64_t others,
                              const memory::MachineMemory& machine);

/// What this process may have in all, and can have without swapping, in bytes.
std::uint64_t ram_ceiling(const LoadOptions& options, const memory::MachineMemory& machine);

/// How the files are read.
storage::ReaderOptions reader_options(const LoadOptions& options);

/// What a load finds around it.
struct Machine {
  storage::ReaderOptions reading;
  std::function<memory::MachineMemory()> memory = memory::machine_memory;
};

class Tiers {
 public:
  /// The backend, the weights and the trace (which may be null) must outlive this.
  /// `reserved`: bytes of all but the experts; `ceiling`: of everything, ram_ceiling().
  Tiers(ops::Backend& backend, const model::ModelSpec& spec, LoadedWeights& loaded,
        const residency::RamPlan& plan, std::uint64_t reserved, std::uint64_t ceiling,
        const LoadOptions& options, Trace* trace);
  /// Saves the warm-start file.
  ~Tiers();
  Tiers(const Tiers&) = delete;
  Tiers& operator=(const Tiers&) = delete;

  residency::ExpertRunner& runner() noexcept { return *runner_; }
  /// Null where all layers' dense weights are in memory.
  residency::LayerStream* layers() noexcept { return stream_.get(); }
  bool tiered() const noexcept { return store_ != nullptr; }

  // Between steps only.
  void configure(const MemoryConfig& config);
  /// Throws ParameterError if the experts were loaded whole, MemoryLimitError if there is no room,
  /// and what `poll` throws while reads in flight are waited for; then nothing has changed.
  void place(const MemoryStrategy& strategy, const Poll& poll);
  /// Saves the use of experts for the next start, now and then. At any time, from any thread: it
  /// may wait for the disk, so better not in somebody's turn.
  void remember() noexcept;
  /// At any time, from any thread.
  ModelStats stats() const;

 private:
  void make_store(ops::Backend& backend, const model::ModelSpec& spec, Trace* trace);
  void warm_start(const std::string& folder);
  void save_warm_start(bool last) noexcept;

  LoadedWeights& loaded_;
  mutable std::mutex plan_mutex_;  // for stats(), while place() changes it
  residency::RamPlan plan_;
  std::unique_ptr<residency::WarmStart> warm_start_;  // null: nothing is remembered
  std::uint64_t fingerprint_;
  std::uint64_t slot_bytes_ = 0;
  std::size_t experts_per_token_ = 0;
  std::string policy_;
  std::uint64_t ceiling_;   // of the plan's total
  std::uint64_t reserved_;  // by all but the experts
  std::unique_ptr<residency::ExpertStore> store_;
  std::unique_ptr<residency::ExpertRunner> runner_;
  residency::TieredExperts* tiered_ = nullptr;  // the runner, if it is one
  std::unique_ptr<residency::LayerStream> stream_;
};

}  // namespace dsfp4::engine
