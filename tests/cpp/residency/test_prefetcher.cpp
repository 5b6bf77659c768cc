#include <vector>

#include <gtest/gtest.h>

#include "emulated/emulated_ops.h"
#include "emulated/room.h"
#include "residency/prefetcher.h"
#include "residency/tiny_experts.h"

namespace dsfp4::residency {
namespace {

using ops::testing::OwnedMatrix;
using storage::Priority;
using Keys = std::vector<ExpertKey>;

class PrefetcherTest : public TinyExpertsTest {
 protected:
  Prefetcher& make(std::size_t slots) {
    make_store(slots, slots - 1);
    prefetcher_.emplace(*ops_, *store_, router_, routers_, 128);
    return *prefetcher_;
  }
  static constexpr std::int64_t kManyRows = 3;  // of two experts each, of eight
  static ExpertLayer layer(OwnedMatrix& x) {
    ExpertLayer made;
    made.phase = ops::Phase::kDecode;
    made.x = x.view();
    made.top_k = kTopK;
    return made;
  }
  Keys ahead() const { return submitted(Priority::kSpeculative); }
  static Keys keys_of(std::int64_t moe_layer, const std::vector<std::int32_t>& experts) {
    Keys keys;
    for (const std::int32_t e : experts) {
      keys.push_back(static_cast<ExpertKey>(moe_layer * kExperts + e));
    }
    return keys;
  }

  std::optional<Prefetcher> prefetcher_;
  ReadAhead step_;
};

TEST_F(PrefetcherTest, APromptIsSureToNeedTheFirstLayersExpertsAndAFewTokensAreNot) {
  Prefetcher& prefetcher = make(16);
  const std::vector<float> scores(kExperts, 0.0f);
  for (const std::int32_t e : {5, 2}) store_->note_use(0, std::span(&e, 1), scores);
  prefetcher.expect(8 * kExperts / kTopK - 1, step_);
  EXPECT_TRUE(reader_.reads.empty());
  prefetcher.expect(8 * kExperts / kTopK, step_);
  const Keys order = ahead();
  ASSERT_EQ(order.size(), static_cast<std::size_t>(kExperts));  // the most valued first
  EXPECT_EQ(order[0], 2u);
  EXPECT_EQ(order[1], 5u);
}

TEST_F(PrefetcherTest, NamesTheNearestLayersLikeliestFirst) {
  OwnedMatrix x(1, kHidden, 7);
  Prefetcher& prefetcher = make(16);
  prefetcher.predict(0, layer(x), 0, true, arena_, step_);
  EXPECT_TRUE(ahead().empty());
  prefetcher.predict(0, layer(x), 5, true, arena_, step_);  // there are but two more
  Keys right = keys_of(1, preferred(1, x.view()));
  for (const ExpertKey key : keys_of(2, preferred(2, x.view()))) right.push_back(key);
  EXPECT_EQ(ahead(), right);
  EXPECT_EQ(step_.predicted, preferred(1, x.view()));
  EXPECT_TRUE(step_.named.empty());
  EXPECT_EQ(arena_.used(), 0u);
}

TEST_F(PrefetcherTest, OneTokenOfManyIsNotEnoughToReadAnExpertFor) {
  OwnedMatrix x(kManyRows, kHidden, 11);
  std::vector<int> wanted(kExperts);
  for (const std::int32_t e : preferred(1, x.view())) ++wanted[static_cast<std::size_t>(e)];
  // One row is moved until some expert is wanted just once.
  for (std::uint32_t seed = 12; std::ranges::find(wanted, 1) == wanted.end(); ++seed) {
    ASSERT_LT(seed, 1000u);
    x = OwnedMatrix(kManyRows, kHidden, seed);
    std::ranges::fill(wanted, 0);
    for (const std::int32_t e : preferred(1, x.view())) ++wanted[static_cast<std::size_t>(e)];
  }
  make(16).predict(0, layer(x), 1, true, arena_, step_);
  Keys named = ahead();
  for (std::size_t i = 0; i + 1 < named.size(); ++i) {
    EXPECT_GE(wanted[named[i] - kExperts], wanted[named[i + 1] - kExperts]) << i;
  }
  std::ranges::sort(named);
  Keys right;
  for (std::size_t e = 0; e < wanted.size(); ++e) {
    if (wanted[e] > 1) right.push_back(static_cast<ExpertKey>(kExperts + e));
  }
  EXPECT_EQ(named, right);
}

TEST_F(PrefetcherTest, WhatFindsNoRoomIsSubmittedLaterAndForgottenWhenTheLayerIsReached) {
  OwnedMatrix x(1, kHidden, 7);
  Prefetcher& prefetcher = make(1);
  prefetcher.predict(0, layer(x), 2, true, arena_, step_);
  const Keys first = keys_of(1, preferred(1, x.view()));
  EXPECT_EQ(ahead(), Keys{first[0]});
  EXPECT_EQ(step_.named.size(), 3u);
  EXPECT_EQ(step_.named.back(), first[1]);
  store_->drop_speculation(1);
  reader_.complete_cancelled();
  prefetcher.submit(step_);
  EXPECT_EQ(ahead(), first);

  // Layer 1 chooses one expert that was predicted and one that was not.
  std::int32_t other = 0;
  while (std::ranges::find(step_.predicted, other) != step_.predicted.end()) ++other;
  std::vector<std::int32_t> pairs = {0, 1};
  const std::vector<ChosenExpert> chosen = {{step_.predicted[1], std::span(pairs).first(1)},
                                            {other, std::span(pairs).last(1)}};
  prefetcher.chosen(1, chosen, step_);
  EXPECT_EQ(prefetcher.stats().predicted, 2u);
  EXPECT_EQ(prefetcher.stats().predicted_used, 1u);
  EXPECT_EQ(prefetcher.stats().chosen, 2u);
  EXPECT_EQ(step_.named.size(), 2u);  // those of layer 2
  prefetcher.chosen(2, chosen, step_);
  EXPECT_TRUE(step_.named.empty());
  EXPECT_EQ(prefetcher.stats().chosen, 2u);  // there was no prediction for that layer
}

TEST_F(PrefetcherTest, StepsThatTakeTurnsKeepTheirPredictionsApart) {
  OwnedMatrix x(1, kHidden, 7);
  OwnedMatrix y(1, kHidden, 8);
  Prefetcher& prefetcher = make(1);
  ReadAhead other;
  prefetcher.predict(0, layer(x), 1, true, arena_, step_);
  const std::vector<ExpertKey> named = step_.named;
  ASSERT_FALSE(named.empty());
  prefetcher.predict(1, layer(y), 1, true, arena_, other);
  prefetcher.chosen(1, {}, other);
  EXPECT_EQ(step_.named, named);
  EXPECT_EQ(step_.predicted, preferred(1, x.view()));
}

// ---- beside a GPU

// The routers lie on the emulated device, which answers when it comes to it.
class PrefetcherOnADevice : public PrefetcherTest {
 protected:
  PrefetcherOnADevice() {
    for (std::size_t layer = 0; layer < gates_.size(); ++layer) use_gate(layer);
    make_store(16, 15);
    prefetcher_.emplace(compute_, *store_, router_, routers_, 2, [this](ExpertKey key) {
      return std::ranges::find(in_vram_, key) != in_vram_.end();
    });
    x_ = room_.matrix(1, kHidden, 7);
    device_.synchronize();
  }
  void TearDown() override {
    device_.run_empty();
    prefetcher_.reset();
  }
  void use_gate(std::size_t layer) {
    routers_[layer].gate = room_.weight(format::WeightFormat::kF32, kExperts, kHidden,
                                        static_cast<std::uint32_t>(layer + 1));
  }
  void predict(std::int64_t moe_layer, std::int64_t ahead, ReadAhead& step) {
    ExpertLayer layer;
    layer.phase = ops::Phase::kDecode;
    layer.x = x_;
    layer.top_k = kTopK;
    prefetcher_->predict(moe_layer, layer, ahead, true, scratch_, step);
  }
  void take(ReadAhead& step) {
    prefetcher_->take(step);
    prefetcher_->submit(step);
  }
  Keys right(std::int64_t moe_layer) {
    OwnedMatrix x(1, kHidden, 7);
    for (std::size_t layer = 0; layer < gates_.size(); ++layer) {
      routers_[layer].gate = gates_[layer].view();
    }
    return keys_of(moe_layer, preferred(moe_layer, x.view()));
  }

  ops::testing::EmulatedOps compute_;
  ops::testing::EmulatedDevice& device_ = *compute_.emulated();
  ops::testing::Room room_{device_};
  memory::Arena scratch_{1 << 16, "the scratch", device_.memory()};
  ops::Matrix x_;
  Keys in_vram_;
};

TEST_F(PrefetcherOnADevice, NobodyWaitsForTheAnswer) {
  device_.hold(ops::Queue::kCompute);
  predict(0, 2, step_);
  take(step_);
  EXPECT_TRUE(ahead().empty());
  device_.let_go(ops::Queue::kCompute);
  device_.synchronize();
  take(step_);
  Keys both = right(1);
  for (const ExpertKey key : right(2)) both.push_back(key);
  EXPECT_EQ(ahead(), both);
}

TEST_F(PrefetcherOnADevice, AGuessMayBeAskedForWithoutReads) {
  ExpertLayer layer;
  layer.phase = ops::Phase::kDecode;
  layer.x = x_;
  layer.top_k = kTopK;
  prefetcher_->predict(0, layer, 1, false, scratch_, step_);
  device_.synchronize();
  take(step_);
  EXPECT_TRUE(ahead().empty());
  EXPECT_EQ(step_.predicted.size(), static_cast<std::size_t>(kTopK));
}

TEST_F(PrefetcherOnADevice, AnotherStepsAnswerIsNotTaken) {
  device_.hold(ops::Queue::kCompute);
  ReadAhead other;
  predict(0, 1, step_);
  predict(1, 1, other);
  device_.let_go(ops::Queue::kCompute);
  device_.synchronize();
  take(step_);
  EXPECT_TRUE(ahead().empty());
  take(other);
  EXPECT_EQ(ahead(), right(2));
}

TEST_F(PrefetcherOnADevice, AnAnswerThatComesTooLateNamesNothing) {
  device_.hold(ops::Queue::kCompute);
  predict(0, 1, step_);
  prefetcher_->chosen(1, {}, step_);
  device_.let_go(ops::Queue::kCompute);
  device_.synchronize();
  take(step_);
  EXPECT_TRUE(ahead().empty());
}

TEST_F(PrefetcherOnADevice, NothingIsReadThatLiesInVram) {
  const Keys all = right(1);
  use_gate(1);
  in_vram_ = {all[0]};
  predict(0, 1, step_);
  device_.synchronize();
  take(step_);
  EXPECT_EQ(ahead(), Keys{all[1]});
}

TEST_F(PrefetcherOnADevice, AsManyLayersAsTheAnswerHasRoomFor) {
  x_ = room_.matrix(40, kHidden, 7);  // of 64 rows in all
  predict(0, 2, step_);
  device_.synchronize();
  take(step_);
  for (const ExpertKey key : ahead()) EXPECT_EQ(key / kExperts, 1);
  EXPECT_FALSE(ahead().empty());
}

}  // namespace
}  // namespace dsfp4::residency
