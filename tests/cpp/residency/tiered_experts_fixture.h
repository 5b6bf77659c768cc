// Layers whose experts lie in RAM and in files, and the same with all in memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "residency/resident_experts.h"
#include "residency/tiered_experts.h"
#include "residency/tiny_experts.h"

namespace dsfp4::residency {

using ops::testing::OwnedMatrix;
using Keys = std::vector<ExpertKey>;

// A prompt's results are added to this.
inline constexpr float kBefore = 0.5f;

// One layer of one step: its input, its choice, and what comes out.
struct Step {
  Step(std::int64_t model_layer, std::vector<std::int32_t> choice, std::int64_t hidden,
       std::int64_t experts, std::int64_t top_k, std::uint32_t seed = 5)
      : layer(model_layer),
        used(std::move(choice)),
        weights(used.size()),
        k(top_k),
        x(std::ssize(used) / top_k, hidden, seed),
        y(std::ssize(used) / top_k, hidden),
        logits(std::ssize(used) / top_k, experts, seed + 1) {
    for (std::size_t i = 0; i < weights.size(); ++i) {
      weights[i] = 0.9f / static_cast<float>(1 + i % static_cast<std::size_t>(k));
    }
  }
  // Before each run.
  ExpertLayer view() {
    if (phase == ops::Phase::kPrefill) std::ranges::fill(y.values, kBefore);
    return {.layer = layer,
            .phase = phase,
            .x = x.view(),
            .routing = {used, used, weights, logits.view()},
            .on_host = {used, used, weights, logits.values},
            .top_k = k,
            .y = y.view()};
  }

  std::int64_t layer;
  ops::Phase phase = ops::Phase::kDecode;
  std::vector<std::int32_t> used;
  std::vector<float> weights;
  std::int64_t k;
  OwnedMatrix x, y, logits;
};

class TieredExpertsTest : public TinyExpertsTest {
 protected:
  TieredExperts& make(std::size_t slots, std::size_t cache_slots, const TieredOptions& options) {
    make_store(slots, cache_slots);
    runner_.emplace(*ops_, *store_, router_, routers_, kFirstLayer, kHidden, kIntermediate, 64,
                    nullptr, nullptr);
    runner_->configure(options);
    return *runner_;
  }
  static Step step(std::vector<std::int32_t> choice, std::uint32_t seed = 5) {
    return {kFirstLayer, std::move(choice), kHidden, kExperts, kTopK, seed};
  }
  // A prompt, whose experts pass by the cache once that is full; the same experts for each row.
  static Step prompt(const std::vector<std::int32_t>& choice, std::uint32_t seed = 5) {
    std::vector<std::int32_t> used;
    for (int i = 0; i < 17; ++i) used.insert(used.end(), choice.begin(), choice.end());
    Step made = step(std::move(used), seed);
    made.phase = ops::Phase::kPrefill;
    return made;
  }
  std::unique_ptr<ExpertWork> start(Step& step) {
    return runner_->start(step.view(), arena_, ahead_);
  }
  // To the end; open reads complete in the order that `next` picks from.
  template <typename Next>
  void finish(ExpertWork& work, const Next& next) {
    for (int i = 0; i < 1000; ++i) {
      if (const std::vector<std::size_t> open = open_reads(); !open.empty()) {
        reader_.complete(open[next(open.size())]);
      }
      if (!work.advance()) return;
    }
    FAIL() << "it never ends";
  }
  void finish(ExpertWork& work) {
    finish(work, [](std::size_t) { return std::size_t{0}; });
  }
  std::vector<std::size_t> open_reads() const {
    std::vector<std::size_t> open;
    for (std::size_t i = 0; i < reader_.reads.size(); ++i) {
      if (!reader_.reads[i].over) open.push_back(i);
    }
    return open;
  }
  // With every expert in memory.
  std::vector<float> right(Step step) {
    ResidentExperts resident(*ops_, kHidden, kIntermediate, [&](std::int64_t layer) {
      const auto first = static_cast<std::size_t>((layer - kFirstLayer) * kExperts);
      return std::span<const ops::ExpertView>(views_).subspan(first, kExperts);
    });
    ReadAhead none;
    const auto work = resident.start(step.view(), arena_, none);
    while (work->advance()) {
    }
    return step.y.values;
  }
  void expect_nothing_held() {
    EXPECT_TRUE(store_->is_consistent());
    EXPECT_EQ(arena_.used(), 0u);
  }

  std::optional<TieredExperts> runner_;
  ReadAhead ahead_;
};

inline constexpr TieredOptions kNoPrefetch{0, 0.0f};

}  // namespace dsfp4::residency
