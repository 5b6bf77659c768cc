// The ExpertRunner of a model that does not fit: experts are computed where they lie in RAM while
// the missing ones are read, and each missing one as soon as it arrives.
//
// For one layer: reads of missing experts are submitted first (as many as there are slots), then
// what the next layers will probably need, then everything that is in RAM is computed, the shared
// expert too, then what arrives, in whatever order; the results are summed in slot order at the
// end. A prompt's experts are read and computed by number, ascending, and each is added at once, so
// that no more than a group's results are kept. So neither the cache nor the disk can change a
// token's bits, but for a DeviceTier that splits experts by measured rates.
//
// Work that is left for another step's keeps its pins, but never all of two or more slots,
// so the other can go on.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "base/counter.h"
#include "base/trace.h"
#include "residency/device_tier.h"
#include "residency/expert_runner.h"
#include "residency/expert_store.h"
#include "residency/expert_tasks.h"
#include "residency/prefetcher.h"

namespace dsfp4::residency {

struct TieredOptions {
  /// The next so many MoE layers' experts are predicted and read when the disk is idle; 0 is off.
  /// Not given: 1 where it is sure to pay, for prompts, whose tokens need most experts between
  /// them, and while the cache has room; else 0.
  std::optional<std::int64_t> prefetch_layers;
  /// A missing expert whose share of its token's routing weight is below this is left out; 0 is
  /// exact.
  float expert_threshold = 0.0f;
  /// As DeviceTier::set_host_share().
  std::optional<double> host_share = std::nullopt;
};

struct TieredStats {
  Counter<std::uint64_t> skipped_pairs;  // (token, expert) pairs left out by expert_threshold
  Counter<std::uint64_t> total_pairs;
  Counter<std::uint64_t>
      used_bytes;                   // of experts that were computed with, once for each layer step
  Counter<double> wait_seconds;     // in which nothing was left to compute but for reads
  Counter<double> compute_seconds;  // of experts
};

class TieredExperts final : public ExpertRunner {
 public:
  /// `routers`: one for each MoE layer, the first of which is the model's `first_layer`. Steps have
  /// at most `most_rows` rows. `device`:
  /// the GPU's part, if `ops` compute there; null on the host. All must outlive this, and so must
  /// `trace`, which may be null.
  TieredExperts(ops::Ops& ops, ExpertStore& store, ops::RouterSpec router,
                std::vector<RouterView> routers, std::int64_t first_layer, std::int64_t hidden_size,
                std::int64_t moe_intermediate_size, std::int64_t most_rows, DeviceTier* device,
                Trace* trace);

  bool needs_host(ops::Phase /*phase*/) const override { return true; }
  bool needs_x(std::int64_t rows) const override {
    return device_ != nullptr && device_->uses_host(rows);
  }
  void begin_step(ops::Phase phase, std::int64_t rows, ReadAhead& ahead) override;
  std::unique_ptr<ExpertWork> start(const ExpertLayer& layer, memory::Arena& arena,
                                    ReadAhead& ahead) override;
  void after_error() noexcept override {
    if (device_ != nullptr) device_->give_up();
  }
  /// Arena bytes that work takes for `tokens` tokens: pair_scratch_bytes(), or what is computed
  /// before if that takes more.
  static std::size_t scratch_bytes(const MoeShape& shape, std::int64_t tokens, ops::Phase phase);

  /// Between steps only; the statistics may be read at any time.
  void configure(const TieredOptions& options);
  /// Between steps only. False: nothing is read ahead, and a layer's routed experts are computed
  /// once all its reads are over.
  void overlap(bool reads) noexcept { overlaps_reads_ = reads; }
  const TieredOptions& options() const noexcept { return options_; }
  const TieredStats& stats() const noexcept { return stats_; }
  const PrefetchStats& prefetch_stats() const noexcept { return prefetcher_.stats(); }

 private:
  class Work;

  std::int64_t layers_ahead(ops::Phase phase) const;
  /// Tells the policy of these rows of the step.
  void note_use(std::int64_t moe_layer, const ExpertLayer& layer, std::int64_t first,
                std::int64_t end);

  ops::Ops& ops_;
  ExpertStore& store_;
  ops::RouterSpec router_;
  std::vector<RouterView> routers_;
  std::int64_t first_layer_;
  std::int64_t hidden_size_;
  std::int64_t moe_intermediate_size_;
  DeviceTier* device_;
  Trace* trace_;
  TieredOptions options_;
  bool overlaps_reads_ = true;
  TieredStats stats_;
  Prefetcher prefetcher_;
};

}  // namespace dsfp4::residency
