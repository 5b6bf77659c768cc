#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "residency/tiered_experts_fixture.h"

namespace dsfp4::residency {
namespace {

using storage::Priority;

TEST_F(TieredExpertsTest, MissesAreReadFirstThenPredictionsThenWhatIsThereIsComputed) {
  make(12, 6, {1, 0.0f});
  for (const ExpertKey key : {3u, 6u}) bring(key);
  const std::size_t before = reader_.reads.size();
  Step layer = step({3, 5, 1, 6});
  Keys computed;
  on_compute_ = [&](std::span<const ExpertKey> keys) {
    computed.assign(keys.begin(), keys.end());
    EXPECT_GE(reader_.reads.size(), before + 3);
  };
  const auto work = start(layer);
  EXPECT_TRUE(computed.empty());
  EXPECT_EQ(submitted(Priority::kDemand, before), (Keys{1, 5}));
  const Keys ahead = submitted(Priority::kSpeculative, before);
  ASSERT_GE(ahead.size(), 2u);
  const auto in_next_layer = [](ExpertKey key) {
    return key >= static_cast<ExpertKey>(kExperts) && key < static_cast<ExpertKey>(2 * kExperts);
  };
  EXPECT_TRUE(std::ranges::all_of(ahead, in_next_layer));
  EXPECT_EQ(key_of(reader_.reads[before]), 1u);  // in front of every prediction
  EXPECT_EQ(key_of(reader_.reads[before + 1]), 5u);
  EXPECT_TRUE(work->advance());
  EXPECT_EQ(computed, (Keys{3, 6}));
  finish(*work);
  EXPECT_EQ(layer.y.values, right(layer));
}

TEST_F(TieredExpertsTest, ArrivalInAnyOrderAndFewSlotsGiveTheSameBits) {
  std::mt19937 random(3);
  for (int round = 0; round < 60; ++round) {
    std::vector<std::int32_t> used(static_cast<std::size_t>(round % 2 == 0 ? 3 : 20) * kTopK);
    for (std::size_t i = 0; i < used.size(); i += 2) {
      used[i] = static_cast<std::int32_t>(random() % kExperts);
      used[i + 1] = static_cast<std::int32_t>((used[i] + 1 + random() % (kExperts - 1)) % kExperts);
    }
    const std::size_t slots = 1 + random() % 6;
    make(slots, random() % slots, {round % 3, 0.0f});
    for (int again = 0; again < 2; ++again) {
      Step layer = step(used, 5 + random() % 100);
      if (round % 4 >= 2) layer.phase = ops::Phase::kPrefill;
      const auto work = start(layer);
      finish(*work, [&](std::size_t open) { return random() % open; });
      EXPECT_EQ(layer.y.values, right(layer)) << round;
    }
    expect_nothing_held();
    runner_.reset();
    store_.reset();
    for (const std::size_t i : open_reads()) reader_.complete(i);
  }
}

TEST_F(TieredExpertsTest, NothingThatArrivesIsNoEnd) {
  make(4, 2, kNoPrefetch);
  Step layer = step({1, 2});
  const auto work = start(layer);
  EXPECT_TRUE(work->advance());  // back after a moment, so that the caller may leave
  EXPECT_TRUE(work->advance());
  EXPECT_EQ(runner_->stats().used_bytes, 0u);
  finish(*work);
  EXPECT_FALSE(work->advance());
  EXPECT_EQ(layer.y.values, right(layer));
}

TEST_F(TieredExpertsTest, ALightExpertThatIsMissingIsLeftOut) {
  make(6, 4, {0, 0.4f});
  Step layer = step({2, 5});  // weights 0.9 and 0.45, a third
  {
    const auto work = start(layer);
    EXPECT_EQ(submitted(Priority::kDemand), Keys{2});
    EXPECT_FLOAT_EQ(layer.weights[0], 1.35f);  // renormalised to the original sum
    EXPECT_EQ(layer.weights[1], 0.0f);
    finish(*work);
    EXPECT_EQ(layer.y.values, right(layer));
  }
  EXPECT_EQ(runner_->stats().skipped_pairs, 1u);

  bring(5);
  Step both = step({2, 5});  // both are there
  finish(*start(both));
  EXPECT_EQ(both.weights[1], 0.45f);
  EXPECT_EQ(both.y.values, right(both));

  runner_->configure({0, 1.0f});  // the heaviest stays all the same
  Step other = step({6, 7});
  const auto work = start(other);
  finish(*work);
  EXPECT_EQ(other.y.values, right(other));
  EXPECT_EQ(runner_->stats().skipped_pairs, 2u);
  EXPECT_EQ(runner_->stats().total_pairs, 6u);
}

TEST_F(TieredExpertsTest, AFailedReadNamesTheExpertAndLeavesNothingBehind) {
  make(4, 2, kNoPrefetch);
  Step layer = step({1, 2});
  {
    const auto work = start(layer);
    reader_.complete(1, storage::ReadStatus::kFailed);
    try {
      while (work->advance()) {
      }
      FAIL();
    } catch (const IoError& error) {
      EXPECT_NE(std::string(error.what()).find("expert 2 of layer 2"), std::string::npos);
    }
  }
  expect_nothing_held();
  const auto work = start(layer);
  finish(*work);
  EXPECT_EQ(layer.y.values, right(layer));
}

TEST_F(TieredExpertsTest, WhatACheckRefusesIsReadAgain) {
  make(4, 2, kNoPrefetch);
  Step layer = step({1, 2});
  on_compute_ = [](std::span<const ExpertKey>) {
    throw CheckpointError("file", "tensor", 7, "is not what it was");
  };
  EXPECT_THROW(finish(*start(layer)), CheckpointError);
  on_compute_ = {};
  expect_nothing_held();
  const std::size_t before = reader_.reads.size();
  const auto work = start(layer);
  finish(*work);
  EXPECT_EQ(layer.y.values, right(layer));
  EXPECT_FALSE(submitted(Priority::kDemand, before).empty());
}

TEST_F(TieredExpertsTest, MayBeLeftAtAnyPoint) {
  make(4, 2, {1, 0.0f});
  bool ended = false;
  for (int pieces = 0; !ended; ++pieces) {
    ASSERT_LT(pieces, 100);
    {
      Step layer = prompt({0, 1, 2, 3, 4, 5});
      const auto work = start(layer);
      for (int i = 0; i < pieces && !ended; ++i) {
        if (const auto open = open_reads(); !open.empty()) reader_.complete(open.back());
        ended = !work->advance();
      }
    }
    expect_nothing_held();
    Step layer = step({3, 6});
    const auto work = start(layer);
    finish(*work);
    EXPECT_EQ(layer.y.values, right(layer)) << pieces;
  }
}

TEST_F(TieredExpertsTest, WorkThatIsLeftForAnothersLetsThatGoOn) {
  for (const bool decode : {false, true}) {
    for (const std::size_t cached : {0u, 1u, 2u}) {
      make(3, cached, kNoPrefetch);
      for (ExpertKey key = 0; key < cached; ++key) bring(key);
      const std::vector<std::int32_t> firsts = {0, 1, 2, 3};
      Step first = decode ? step(firsts) : prompt(firsts);
      Step second = decode ? step({4, 5, 6, 1}, 9) : prompt({4, 5, 6, 1}, 9);
      memory::Arena other_arena(1 << 20, "the scratch");
      ReadAhead other_ahead;
      const auto left = start(first);
      for (const std::size_t i : open_reads()) reader_.complete(i);
      const auto work = runner_->start(second.view(), other_arena, other_ahead);
      finish(*work);
      EXPECT_EQ(second.y.values, right(second)) << decode << cached;
      finish(*left);
      EXPECT_EQ(first.y.values, right(first)) << decode << cached;
      runner_.reset();
      store_.reset();
    }
  }
}

TEST_F(TieredExpertsTest, EvenWhereThePassersBySlotIsPinnedAndTheRestIsCached) {
  make(3, 2, kNoPrefetch);
  for (const ExpertKey key : {0u, 1u}) bring(key);
  Step first = prompt({2, 3});
  Step second = prompt({4, 5}, 9);
  memory::Arena other_arena(1 << 20, "the scratch");
  ReadAhead other_ahead;
  const auto left = start(first);  // 2, into the only slot that holds nothing cached
  for (const std::size_t i : open_reads()) reader_.complete(i);
  const auto work = runner_->start(second.view(), other_arena, other_ahead);
  finish(*work);
  EXPECT_EQ(second.y.values, right(second));
  finish(*left);
  EXPECT_EQ(first.y.values, right(first));
}

// Reads ahead of one layer by a prompt, or while the cache has room, if nothing else was asked for.
TEST_F(TieredExpertsTest, HowFarAheadItReads) {
  const auto layers_ahead = [&](std::optional<std::int64_t> wish, bool many, bool warm) {
    make(14, warm ? 2 : 4, {wish, 0.0f});
    for (ExpertKey key = 0; warm && key < 2; ++key) bring(key);
    const std::size_t before = reader_.reads.size();
    Step layer = many ? prompt({0, 1}) : step({0, 1});
    finish(*start(layer));
    std::array<int, kLayers> reads{};
    for (const ExpertKey key : submitted(Priority::kSpeculative, before)) ++reads[key / kExperts];
    runner_.reset();
    store_.reset();
    for (const std::size_t i : open_reads()) reader_.complete(i);
    EXPECT_FALSE(reads[1] == 0 && reads[2] > 0);
    return (reads[1] > 0 ? 1 : 0) + (reads[2] > 0 ? 1 : 0);
  };
  EXPECT_EQ(layers_ahead({}, false, true), 0);
  EXPECT_EQ(layers_ahead({}, false, false), 1);
  EXPECT_EQ(layers_ahead({}, true, true), 1);
  EXPECT_EQ(layers_ahead({}, true, false), 1);
  for (const bool many : {false, true}) {
    for (const std::int64_t wish : {0, 1, 2}) EXPECT_EQ(layers_ahead(wish, many, true), wish);
  }
}

TEST_F(TieredExpertsTest, PredictionsEndWhenTheirLayerIsReached) {
  make(12, 2, {1, 0.0f});
  Step first = step({0, 1});
  finish(*start(first), [](std::size_t) { return std::size_t{0}; });
  const Keys predicted = submitted(Priority::kSpeculative);
  ASSERT_FALSE(predicted.empty());
  const auto key = static_cast<std::int32_t>(predicted.front() - kExperts);
  std::vector<std::int32_t> others;
  for (std::int32_t e = 0; e < kExperts && others.size() < kTopK; ++e) {
    if (e != key) others.push_back(e);
  }
  Step second{kFirstLayer + 1, others, kHidden, kExperts, kTopK};
  const auto open = open_reads().size();
  const auto work = start(second);
  EXPECT_EQ(runner_->prefetch_stats().predicted, predicted.size());
  EXPECT_GE(reader_.cancelled.size() + 2, open);
  reader_.complete_cancelled();
  finish(*work);
  EXPECT_EQ(second.y.values, right(second));
  for (const ExpertKey named : ahead_.named) EXPECT_GE(named, 2u * kExperts);
}

TEST_F(TieredExpertsTest, AStepBeginsWithWhatAPromptIsSureToNeed) {
  make(12, 8, {});
  runner_->begin_step(ops::Phase::kDecode, 1, ahead_);
  EXPECT_TRUE(reader_.reads.empty());
  runner_->begin_step(ops::Phase::kPrefill, 8 * kExperts, ahead_);
  EXPECT_EQ(submitted(Priority::kSpeculative).size(), static_cast<std::size_t>(kExperts));
}

}  // namespace
}  // namespace dsfp4::residency
