// Experts of prompts, which pass by the cache.
#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "residency/tiered_experts_fixture.h"

namespace dsfp4::residency {
namespace {

using storage::Priority;

TEST_F(TieredExpertsTest, APromptIsComputedAFewExpertsAtATime) {
  make(12, 9, kNoPrefetch);
  for (ExpertKey key = 0; key < kExperts; ++key) bring(key);
  std::vector<std::size_t> groups;
  on_compute_ = [&](std::span<const ExpertKey> keys) { groups.push_back(keys.size()); };
  Step layer = prompt({0, 1, 2, 3, 4, 5, 6, 7});
  const auto work = start(layer);
  EXPECT_TRUE(groups.empty());
  EXPECT_TRUE(work->advance());
  EXPECT_EQ(groups, std::vector<std::size_t>{4});
  EXPECT_FALSE(work->advance());
  EXPECT_EQ(groups, (std::vector<std::size_t>{4, 4}));
  EXPECT_EQ(layer.y.values, right(layer));
}

// Also where later ones are in RAM already, in any number of slots; each is read once.
TEST_F(TieredExpertsTest, APromptsExpertsAreReadAndComputedByNumber) {
  std::mt19937 random(11);
  for (const std::size_t slots : {2u, 3u, 5u, 12u}) {
    for (const std::size_t cached : {0u, 1u}) {
      make(slots, cached, kNoPrefetch);
      if (cached > 0) bring(6);
      const std::size_t before = reader_.reads.size();
      Keys computed;
      on_compute_ = [&](std::span<const ExpertKey> keys) {
        computed.insert(computed.end(), keys.begin(), keys.end());
      };
      Step layer = prompt({7, 3, 0, 6, 1, 4});
      finish(*start(layer), [&](std::size_t open) { return random() % open; });
      on_compute_ = {};
      EXPECT_EQ(computed, (Keys{0, 1, 3, 4, 6, 7})) << slots;
      EXPECT_EQ(submitted(Priority::kDemand, before),
                cached > 0 ? (Keys{0, 1, 3, 4, 7}) : (Keys{0, 1, 3, 4, 6, 7}))
          << slots;
      EXPECT_EQ(layer.y.values, right(layer)) << slots;
      expect_nothing_held();
      runner_.reset();
      store_.reset();
    }
  }
}

// Its last 512 rows, by the time that it is over.
TEST_F(TieredExpertsTest, APromptTellsWhatItsLastRowsUse) {
  std::vector<std::int32_t> used;
  for (int row = 0; row < 600; ++row) {
    const std::int32_t first = row < 600 - 512 ? 6 : row == 600 - 512 ? 2 : 0;
    used.insert(used.end(), {first, first + 1});
  }
  Step layer = step(used);
  layer.phase = ops::Phase::kPrefill;
  make(5, 2, kNoPrefetch);
  finish(*start(layer));
  const Keys keys{0, 2, 5, 6};  // 5 is used by none
  std::vector<float> worth(keys.size());
  store_->worth(keys, worth);
  EXPECT_GT(worth[0], worth[1]);
  EXPECT_GT(worth[1], worth[2]);
  EXPECT_EQ(worth[3], worth[2]);
}

// Its scratch holds about a row's one pair, not all; where chunks end changes no bit.
TEST_F(TieredExpertsTest, ALongPromptTakesTheScratchThatIsSaid) {
  constexpr std::int64_t kRows = 1500;
  MoeShape shape{kHidden, kIntermediate, 0, router_};
  std::vector<std::int32_t> used;
  for (std::int32_t t = 0; t < kRows; ++t) {
    used.push_back(t % 3 == 0 ? t % 8 : 5);
    used.push_back(used.back() == 2 ? 7 : 2);
  }
  Step whole = step(used);
  whole.phase = ops::Phase::kPrefill;
  make(3, 1, kNoPrefetch);
  memory::Arena exact(TieredExperts::scratch_bytes(shape, kRows, whole.phase), "the scratch");
  EXPECT_LT(exact.size(), static_cast<std::size_t>(kRows * kTopK * kHidden) * sizeof(float));
  finish(*runner_->start(whole.view(), exact, ahead_));
  EXPECT_EQ(whole.y.values, right(whole));
  const std::vector<float> result = whole.y.values;

  for (const std::int64_t first : {0, 700}) {
    const std::int64_t rows = first == 0 ? 700 : kRows - 700;
    ExpertLayer part = whole.view();
    OwnedMatrix y(rows, kHidden);
    std::ranges::fill(y.values, kBefore);
    const auto pair = static_cast<std::size_t>(first * kTopK);
    const auto pairs = static_cast<std::size_t>(rows * kTopK);
    part.x = whole.x.view().slice(first, rows);
    part.y = y.view();
    part.routing.used = std::span(whole.used).subspan(pair, pairs);
    part.routing.weights = std::span(whole.weights).subspan(pair, pairs);
    part.on_host.used = part.on_host.experts = std::span(whole.used).subspan(pair, pairs);
    part.on_host.weights = std::span(whole.weights).subspan(pair, pairs);
    part.on_host.logits = part.on_host.logits.subspan(static_cast<std::size_t>(first * kExperts));
    finish(*runner_->start(part, exact, ahead_));
    EXPECT_TRUE(std::ranges::equal(
        y.values,
        std::span(result).subspan(static_cast<std::size_t>(first * kHidden), y.values.size())));
  }
}

}  // namespace
}  // namespace dsfp4::residency
