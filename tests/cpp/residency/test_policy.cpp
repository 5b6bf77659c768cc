#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "residency/policy.h"

namespace dsfp4::residency {
namespace {

const std::vector<float> kScores{0.1f, 0.2f, 0.3f, 0.4f};

void use(Policy& policy, std::int64_t layer, std::vector<std::int32_t> experts) {
  policy.use(layer, experts, kScores);
}

TEST(Policy, LruGivesUpTheLongestUnusedOfAllLayers) {
  const auto policy = make_policy("lru", 2, 4);
  use(*policy, 0, {0});
  use(*policy, 1, {0});
  use(*policy, 0, {1});
  use(*policy, 1, {1});
  EXPECT_LT(policy->value(0), policy->value(1));
  EXPECT_LT(policy->value(4), policy->value(1));
  EXPECT_LT(policy->value(2), policy->value(0));  // never used
}

TEST(Policy, LfuForgets) {
  const auto policy = make_policy("lfu", 1, 4);
  for (int i = 0; i < 10; ++i) use(*policy, 0, {0});
  use(*policy, 0, {1});
  EXPECT_GT(policy->value(0), policy->value(1));
  for (int i = 0; i < 200; ++i) use(*policy, 0, {i % 50 == 0 ? 1 : 2});
  EXPECT_GT(policy->value(1), policy->value(0));
}

TEST(Policy, RouterValuesNearMisses) {
  const auto policy = make_policy("router", 1, 4);
  use(*policy, 0, {3});
  EXPECT_GT(policy->value(2), policy->value(1));
  EXPECT_GT(policy->value(1), policy->value(0));
}

// Equally useful experts: the longer one has to wait for its layer's turn, the sooner it goes.
TEST(Policy, DefaultKeepsWhatComesNext) {
  const auto policy = make_policy("default", 3, 4);
  for (int token = 0; token < 100; ++token) {
    for (std::int64_t layer = 0; layer < 3; ++layer) use(*policy, layer, {0});
  }
  use(*policy, 0, {0});
  for (const ExpertKey expert : {0u, 3u}) {
    EXPECT_GT(policy->value(4 + expert), policy->value(8 + expert)) << expert;
    EXPECT_GT(policy->value(8 + expert), policy->value(expert)) << expert;
  }
  EXPECT_GT(policy->value(0), policy->value(7));  // but use counts for more
}

TEST(Policy, StateGoesOnWhereItWas) {
  std::mt19937 random(1);
  for (const std::string_view name : policy_names()) {
    const auto first = make_policy(name, 3, 4);
    for (int i = 0; i < 30; ++i) {
      use(*first, i % 3, {static_cast<std::int32_t>(random() % 4)});
    }
    const auto second = make_policy(name, 3, 4);
    ASSERT_TRUE(second->restore(first->state())) << name;
    use(*first, 0, {2});
    use(*second, 0, {2});
    for (ExpertKey key = 0; key < 12; ++key) {
      EXPECT_EQ(first->value(key), second->value(key)) << name << " " << key;
    }
  }
}

TEST(Policy, RefusesAnotherState) {
  for (const std::string_view name : policy_names()) {
    const auto policy = make_policy(name, 3, 4);
    std::vector<float> state = policy->state();
    state[0] = NAN;
    EXPECT_FALSE(policy->restore(state)) << name;
    state[0] = 0.0f;
    state.pop_back();
    EXPECT_FALSE(policy->restore(state)) << name;
  }
  EXPECT_THROW(make_policy("fifo", 1, 1), ParameterError);
}

TEST(Replay, CountsWhatAnLruOfThatSizeMisses) {
  // One layer, one expert a token: 0 1 2 0 1 2 ... in a cache of two never hits, of three always.
  std::vector<std::int32_t> used;
  for (int i = 0; i < 30; ++i) used.push_back(i % 3);
  const std::vector<float> scores(30 * 4, 0.0f);
  const auto misses = [&](std::int64_t capacity, std::int64_t first) {
    const auto policy = make_policy("lru", 1, 4);
    return replay_misses(*policy, 1, 4, 1, used, scores, capacity, first);
  };
  EXPECT_EQ(misses(2, 0), 30);
  EXPECT_EQ(misses(3, 0), 3);
  EXPECT_EQ(misses(3, 3), 0);
}

TEST(Policy, SelectionScoresAreTheRouters) {
  const std::vector<float> logits{0.0f, 1.0f};
  const std::vector<float> bias{0.5f, -0.5f};
  std::vector<float> scores(2);
  selection_scores(ops::RouterSpec::Scoring::kSigmoid, logits, bias, scores);
  EXPECT_NEAR(scores[0], 1.0f, 1e-6f);
  EXPECT_NEAR(scores[1], 0.2310586f, 1e-6f);
  selection_scores(ops::RouterSpec::Scoring::kSoftmax, logits, {}, scores);
  EXPECT_NEAR(scores[1], 0.7310586f, 1e-6f);
}

}  // namespace
}  // namespace dsfp4::residency
