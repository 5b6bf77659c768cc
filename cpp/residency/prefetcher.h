// Says what to read while the SSD would idle: the next layers' routers on the hidden state of this
// one, and, where a prompt is so long that every expert of a layer is needed, all of them.
//
// Candidates wait here until a slot is free that holds nothing cached; the store reads them behind
// every demand. A prediction on a GPU is not waited for: take() finds out later.
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

/// The last rows of a prompt are asked for all of it.
inline constexpr std::int64_t kPredictedRows = 1024;

struct PrefetchStats {
  Counter<std::uint64_t> predicted;       // experts named by the prediction one layer ahead
  Counter<std::uint64_t> predicted_used;  // of those, experts that were then chosen
  Counter<std::uint64_t> chosen;          // experts chosen in layers that had a prediction
};

class Prefetcher {
 public:
  using Elsewhere = std::function<bool(ExpertKey)>;
  /// `routers`: one for each MoE layer. Steps have at most `most_rows` rows. `elsewhere`, if given,
  /// says that an expert is in another memory than the store's. All must outlive this. Throws
  /// MemoryLimitError if there is no staging memory for staging_bytes().
  Prefetcher(ops::Ops& ops, ExpertStore& store, const ops::RouterSpec& router,
             std::span<const RouterView> routers, std::int64_t most_rows, Elsewhere elsewhere = {});
  /// Waits for a prediction on its way.
  ~Prefetcher();
  Prefetcher(const Prefetcher&) = delete;
  Prefetcher& operator=(const Prefetcher&) = delete;

  /// `rows` tokens are on their way to the first MoE layer: names its experts, the most valued
  /// first, if they are so many that next to all of them are needed.
  void expect(std::int64_t rows, ReadAhead& step);
  /// Asks what the next `ahead` layers will probably choose, from this one's input x: fewer in a
  /// long prompt, where the answer has no room. What was named before and not begun is forgotten.
  /// Without `reads` nothing is named, and only the step's `predicted` filled in.
  void predict(std::int64_t moe_layer, const ExpertLayer& layer, std::int64_t ahead, bool reads,
               memory::Arena& arena, ReadAhead& step);
  /// If the answer is there, names those experts; submits nothing.
  void take(ReadAhead& step);
  /// Submits reads of what was named, as many as there are slots for.
  void submit(ReadAhead& step);
  /// The layer's choice is known: forgets what was named for it, and counts.
  void chosen(std::int64_t moe_layer, std::span<const ChosenExpert> chosen, ReadAhead& step);

  const PrefetchStats& stats() const noexcept { return stats_; }
  /// Arena bytes that predict() takes for `tokens` tokens.
  static std::size_t scratch_bytes(const MoeShape& shape, std::int64_t tokens);
  static std::size_t staging_bytes(std::int64_t most_rows, std::int64_t top_k);

 private:
  /// The last prediction that was asked for.
  struct Guess {
    std::uint64_t number = 0;
    std::int64_t first_layer = 0;
    std::int64_t layers = 0;
    std::int64_t rows = 0;
    bool reads = true;
  };

  std::vector<std::int32_t> wanted(const std::int32_t* choice, std::int64_t rows) const;
  void name(std::int64_t moe_layer, std::span<const std::int32_t> experts, ReadAhead& step) const;

  ops::Ops& ops_;
  ExpertStore& store_;
  const ops::RouterSpec& router_;
  std::span<const RouterView> routers_;
  const Elsewhere elsewhere_;
  memory::Arena staging_;
  std::int32_t* const choices_;  // in staging_: [layers, rows, top_k]
  const std::int64_t most_pairs_;
  ops::Event there_;  // the last guess
  Guess guess_;
  PrefetchStats stats_;
};

}  // namespace dsfp4::residency
