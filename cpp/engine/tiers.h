// The residency of an engine's weights, put together: the store and the runner of experts, the
// stream of layers, and what is remembered from run to run.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "base/trace.h"
#include "dsfp4/model.h"
#include "dsfp4/rates.h"
#include "engine/loader.h"
#include "engine/planned.h"
#include "model/spec.h"
#include "residency/device_experts.h"
#include "residency/device_tier.h"
#include "residency/device_trace.h"
#include "residency/expert_store.h"
#include "residency/layer_stream.h"
#include "residency/resident_experts.h"
#include "residency/tiered_experts.h"
#include "residency/warm_start.h"

namespace dsfp4::engine {

/// How the files are read.
storage::ReaderOptions reader_options(const LoadOptions& options);

/// Timelines of what the host and a device do; null where none is asked for.
struct Traces {
  Trace* host = nullptr;
  residency::DeviceTrace* device = nullptr;
};

class Tiers {
 public:
  /// `host`: the processor's ops, where `ops` are a GPU's and experts lie in files; else null. All
  /// must outlive this, and so must the traces, which may be null.
  Tiers(ops::Ops& ops, ops::Ops* host, const model::ModelSpec& spec, LoadedWeights& loaded,
        Planned& planned, const Rates& rates, const LoadOptions& options, const Traces& traces);
  /// Saves the warm-start file.
  ~Tiers();
  Tiers(const Tiers&) = delete;
  Tiers& operator=(const Tiers&) = delete;

  residency::ExpertRunner& runner() noexcept { return *runner_; }
  /// Null where all layers' dense weights are in memory.
  residency::DenseLayers* layers() noexcept;
  /// A step has thrown, wherever it was.
  void after_error() noexcept;
  bool tiered() const noexcept { return store_ != nullptr; }

  // Between steps only.
  void configure(const MemoryConfig& config);
  void overlap(const ComputeStreams& streams) noexcept;
  /// Throws ParameterError if the experts were loaded whole, MemoryLimitError if there is no room,
  /// and what `poll` throws while reads in flight are waited for; then nothing has changed.
  void place(const MemoryStrategy& strategy, const Poll& poll);
  /// Saves the use of experts for the next start, now and then. At any time, from any thread: it
  /// may wait for the disk, so better not in somebody's turn.
  void remember() noexcept;
  /// At any time, from any thread.
  ModelStats stats() const;

 private:
  void make_store(ops::Ops& ops, ops::Ops* host, const model::ModelSpec& spec,
                  const residency::Plan& plan, const Traces& traces);
  void resize_both(const residency::Plan& next, const Poll& poll);
  void warm_start(const std::string& folder);
  void save_warm_start(bool last) noexcept;

  ops::Device& device_;
  LoadedWeights& loaded_;
  Planned& planned_;
  const Rates rates_;
  std::unique_ptr<residency::WarmStart> warm_start_;  // null: nothing is remembered
  std::uint64_t fingerprint_;
  std::uint64_t slot_bytes_ = 0;
  std::uint64_t device_slot_bytes_ = 0;
  std::string policy_;
  std::optional<std::int64_t> max_gpu_layers_, min_layers_;  // as they were given
  std::unique_ptr<residency::ExpertStore> store_;
  // Of a GPU's tier, else null.
  std::unique_ptr<residency::DeviceExperts> device_experts_;
  std::unique_ptr<residency::DeviceTier> device_tier_;
  std::unique_ptr<residency::ExpertRunner> runner_;
  residency::TieredExperts* tiered_ = nullptr;              // the runner, if it is one
  std::unique_ptr<residency::LayerStream> stream_;          // from the files
  std::unique_ptr<residency::DeviceLayers> device_layers_;  // from RAM to a GPU
};

}  // namespace dsfp4::engine
