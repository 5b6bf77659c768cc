#include <array>
#include <cmath>
#include <vector>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "ops/routing.h"

namespace dsfp4::ops {
namespace {

struct Routed {
  std::vector<std::int32_t> own, used;
  std::vector<float> weights;
};

Routed route(const RouterSpec& spec, const std::vector<float>& logits,
             const std::vector<float>& bias = {}, const std::vector<std::int32_t>& forced = {}) {
  const auto k = static_cast<std::size_t>(spec.top_k);
  Routed out{std::vector<std::int32_t>(k), std::vector<std::int32_t>(k), std::vector<float>(k)};
  route_token(spec, logits, bias, forced, out.own, out.used, out.weights);
  return out;
}

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

RouterSpec v3_spec() {
  RouterSpec spec;
  spec.experts = 8;
  spec.top_k = 2;
  spec.groups = 4;
  spec.kept_groups = 2;
  spec.scoring = RouterSpec::Scoring::kSigmoid;
  spec.group_score = RouterSpec::GroupScore::kSumOfTop2;
  spec.normalize = true;
  spec.scaling_factor = 2.5f;
  return spec;
}

TEST(Routing, V3KeepsGroupsByTheSumOfTheirBestTwo) {
  // Expert 0 is the best of all, but its group's sum is the worst.
  const std::vector<float> logits = {2.0f, -9.0f, 1.5f, 1.5f, 1.4f, 1.4f, 0.0f, 0.0f};
  const Routed out = route(v3_spec(), logits);
  EXPECT_EQ(out.own, (std::vector<std::int32_t>{2, 3}));
  EXPECT_NEAR(out.weights[0], 1.25f, 1e-6f);
  EXPECT_NEAR(out.weights[1], 1.25f, 1e-6f);
}

TEST(Routing, V3BiasChoosesButDoesNotWeigh) {
  std::vector<float> logits(8, 0.0f);
  std::vector<float> bias(8, 0.0f);
  logits[4] = 1.0f;
  bias[5] = 10.0f;
  const Routed out = route(v3_spec(), logits, bias);
  EXPECT_EQ(out.own, (std::vector<std::int32_t>{5, 4}));
  const float sum = 0.5f + sigmoid(1.0f);
  EXPECT_NEAR(out.weights[0], 2.5f * 0.5f / sum, 1e-6f);
  EXPECT_NEAR(out.weights[1], 2.5f * sigmoid(1.0f) / sum, 1e-6f);
}

TEST(Routing, V2GroupScoreIsTheBestExpertAndWeightsAreNotNormalised) {
  RouterSpec spec;
  spec.experts = 6;
  spec.top_k = 2;
  spec.groups = 3;
  spec.kept_groups = 1;
  spec.scaling_factor = 16.0f;
  const std::vector<float> logits = {3.0f, -5.0f, 2.9f, 2.9f, 0.0f, 0.0f};
  const Routed out = route(spec, logits);
  EXPECT_EQ(out.own, (std::vector<std::int32_t>{0, 1}));
  double sum = 0.0;
  for (const float x : logits) sum += std::exp(x);
  EXPECT_NEAR(out.weights[0], 16.0 * std::exp(3.0) / sum, 1e-5);
  EXPECT_NEAR(out.weights[1], 16.0 * std::exp(-5.0) / sum, 1e-8);
}

TEST(Routing, ForcedExpertsGetTheWeightsOfTheirScores) {
  const std::vector<float> logits = {2.0f, -9.0f, 1.5f, 1.5f, 1.4f, 1.4f, 0.0f, 0.0f};
  const Routed out = route(v3_spec(), logits, {}, {7, 0});
  EXPECT_EQ(out.own, (std::vector<std::int32_t>{2, 3}));
  EXPECT_EQ(out.used, (std::vector<std::int32_t>{7, 0}));
  const float sum = 0.5f + sigmoid(2.0f);
  EXPECT_NEAR(out.weights[0], 2.5f * 0.5f / sum, 1e-6f);
  EXPECT_NEAR(out.weights[1], 2.5f * sigmoid(2.0f) / sum, 1e-6f);
}

TEST(Routing, LowerIndexWinsATieAndNanIsLast) {
  RouterSpec spec;
  spec.experts = 4;
  spec.top_k = 3;
  spec.scoring = RouterSpec::Scoring::kSigmoid;
  EXPECT_EQ(route(spec, {std::nanf(""), 1.0f, 1.0f, 1.0f}).own,
            (std::vector<std::int32_t>{1, 2, 3}));
  EXPECT_EQ(route(spec, {1.0f, 1.0f, 1.0f, 1.0f}).own, (std::vector<std::int32_t>{0, 1, 2}));
}

TEST(Routing, ForcedExpertsAreChecked) {
  RouterSpec spec;
  spec.experts = 4;
  spec.top_k = 2;
  const auto check = [&](const std::vector<std::int32_t>& forced) { check_forced(spec, forced); };
  EXPECT_NO_THROW(check({}));
  EXPECT_NO_THROW(check({0, 3, 3, 0}));
  EXPECT_THROW(check({0, 4}), ParameterError);
  EXPECT_THROW(check({-1, 0}), ParameterError);
  EXPECT_THROW(check({0, 1, 2, 2}), ParameterError);
}

TEST(Routing, SpecIsChecked) {
  RouterSpec spec = v3_spec();
  EXPECT_NO_THROW(check_router(spec, 8, 8));
  EXPECT_THROW(check_router(spec, 7, 0), ParameterError);
  EXPECT_THROW(check_router(spec, 8, 3), ParameterError);
  spec.groups = 3;
  EXPECT_THROW(check_router(spec, 8, 0), ParameterError);
  spec = v3_spec();
  spec.top_k = 5;
  EXPECT_THROW(check_router(spec, 8, 0), ParameterError);
}

}  // namespace
}  // namespace dsfp4::ops
