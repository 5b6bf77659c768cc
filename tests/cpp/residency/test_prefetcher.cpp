#include <vector>

#include <gtest/gtest.h>

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
    prefetcher_.emplace(*ops_, *store_, router_, routers_);
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
  prefetcher.expect(8 * kExperts / kTopK - 1, kTopK, step_);
  EXPECT_TRUE(reader_.reads.empty());
  prefetcher.expect(8 * kExperts / kTopK, kTopK, step_);
  const Keys order = ahead();
  ASSERT_EQ(order.size(), static_cast<std::size_t>(kExperts));  // the most valued first
  EXPECT_EQ(order[0], 2u);
  EXPECT_EQ(order[1], 5u);
}

TEST_F(PrefetcherTest, NamesTheNearestLayersLikeliestFirst) {
  OwnedMatrix x(1, kHidden, 7);
  Prefetcher& prefetcher = make(16);
  prefetcher.predict(0, layer(x), 0, arena_, step_);
  EXPECT_TRUE(ahead().empty());
  prefetcher.predict(0, layer(x), 5, arena_, step_);  // there are but two more
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
  make(16).predict(0, layer(x), 1, arena_, step_);
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
  prefetcher.predict(0, layer(x), 2, arena_, step_);
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
  prefetcher.predict(0, layer(x), 1, arena_, step_);
  const std::vector<ExpertKey> named = step_.named;
  ASSERT_FALSE(named.empty());
  prefetcher.predict(1, layer(y), 1, arena_, other);
  prefetcher.chosen(1, {}, other);
  EXPECT_EQ(step_.named, named);
  EXPECT_EQ(step_.predicted, preferred(1, x.view()));
}

}  // namespace
}  // namespace dsfp4::residency
