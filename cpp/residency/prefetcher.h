// Says what to read while the SSD would idle: the next layers' routers on the hidden state of this
// one, and, where a prompt is so long that every expert of a layer is needed, all of them.
//
// Candidates wait here until a slot is free that holds nothing cached; the store reads them behind
// every demand.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "base/counter.h"
#include "memory/arena.h"
#include "ops/ops.h"
#include "residency/expert_runner.h"
#include "residency/expert_store.h"
#include "residency/expert_tasks.h"
#include "residency/read_ahead.h"

namespace dsfp4::residency {

/// A layer's router, to predict its choice.
struct RouterView {
  ops::WeightView gate;
  DeviceSpan<const float> bias;
  std::vector<float> bias_on_host;
};

struct PrefetchStats {
  Counter<std::uint64_t> predicted;       // experts named by the prediction one layer ahead
  Counter<std::uint64_t> predicted_used;  // of those, experts that were then chosen
  Counter<std::uint64_t> chosen;          // experts chosen in layers that had a prediction
};

class Prefetcher {
 public:
  /// `routers`: one for each MoE layer. All must outlive this.
  Prefetcher(ops::Ops& ops, ExpertStore& store, const ops::RouterSpec& router,
             std::span<const RouterView> routers)
      : ops_(ops), store_(store), router_(router), routers_(routers) {}

  /// `rows` tokens are on their way to the first MoE layer: names its experts, the most valued
  /// first, if they are so many that next to all of them are needed.
  /// Without those that `elsewhere`, if given, says to be in another memory.
  void expect(std::int64_t rows, std::int64_t top_k, ReadAhead& step,
              const std::function<bool(ExpertKey)>& elsewhere = {});
  /// Names what the next `ahead` layers will probably choose, from this one's input x. What was
  /// named before and not begun is forgotten.
  void predict(std::int64_t moe_layer, const ExpertLayer& layer, std::int64_t ahead,
               memory::Arena& arena, ReadAhead& step);
  /// Submits reads of what was named, as many as there are slots for.
  void submit(ReadAhead& step);
  /// The layer's choice is known: forgets what was named for it, and counts.
  void chosen(std::int64_t moe_layer, std::span<const ChosenExpert> chosen, ReadAhead& step);

  const PrefetchStats& stats() const noexcept { return stats_; }
  /// Arena bytes that predict() takes for `tokens` tokens.
  static std::size_t scratch_bytes(const MoeShape& shape, std::int64_t tokens);

 private:
  void name(std::int64_t moe_layer, std::span<const std::int32_t> experts, ReadAhead& step) const;

  ops::Ops& ops_;
  ExpertStore& store_;
  const ops::RouterSpec& router_;
  std::span<const RouterView> routers_;
  PrefetchStats stats_;
};

}  // namespace dsfp4::residency
