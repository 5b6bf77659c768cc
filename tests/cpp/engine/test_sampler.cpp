#include <cmath>
#include <limits>
#include <map>
#include <string>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "engine/sampler.h"

namespace dsfp4::engine {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

GenerateOptions warm(double temperature, std::int64_t top_k = 0, double top_p = 1.0) {
  GenerateOptions options;
  options.temperature = temperature;
  options.top_k = top_k;
  options.top_p = top_p;
  options.seed = 42;
  return options;
}

std::map<std::int32_t, int> draw(const GenerateOptions& options, const std::vector<float>& logits,
                                 int count) {
  Sampler sampler(options, {}, static_cast<std::int64_t>(logits.size()));
  std::map<std::int32_t, int> times;
  for (int i = 0; i < count; ++i) ++times[sampler.sample(logits)];
  return times;
}

TEST(Sampler, GreedyTakesTheBestAndTheLowerIdOfATie) {
  Sampler sampler(warm(0.0), {}, 3);
  EXPECT_EQ(sampler.sample(std::vector<float>{1.0f, 3.0f, 3.0f}), 1);
  EXPECT_EQ(sampler.sample(std::vector<float>{std::nanf(""), -5.0f, -kInf}), 1);
}

TEST(Sampler, AllNanIsAnError) {
  Sampler sampler(warm(0.0), {}, 4);
  EXPECT_THROW(sampler.sample(std::vector<float>(4, std::nanf(""))), Error);
}

TEST(Sampler, FrequenciesFollowTheTemperature) {
  // Probabilities 8/11, 2/11, 1/11 at temperature 1; squared and renormalised at 1/2.
  const std::vector<float> logits = {std::log(1.0f), std::log(8.0f), std::log(2.0f)};
  auto times = draw(warm(1.0), logits, 22000);
  EXPECT_NEAR(times[1], 16000, 400);
  EXPECT_NEAR(times[2], 4000, 400);
  EXPECT_NEAR(times[0], 2000, 400);
  times = draw(warm(0.5), logits, 6900);
  EXPECT_NEAR(times[1], 6400, 250);
  EXPECT_NEAR(times[0], 100, 60);
}

TEST(Sampler, TopKAndTopPCutTheTail) {
  const std::vector<float> logits = {std::log(1.0f), std::log(8.0f), std::log(2.0f)};
  EXPECT_EQ(draw(warm(1.0, 2), logits, 2000).count(0), 0u);
  EXPECT_EQ(draw(warm(1.0, 1), logits, 200).size(), 1u);
  EXPECT_EQ(draw(warm(1.0, 0, 0.7), logits, 2000).size(), 1u);   // 8/11 = 0.727
  EXPECT_EQ(draw(warm(1.0, 0, 0.75), logits, 2000).size(), 2u);  // needs the second
}

TEST(Sampler, MinPIsRelativeToTheLikeliest) {
  const std::vector<float> logits = {std::log(1.0f), std::log(8.0f), std::log(2.0f)};
  GenerateOptions options = warm(1.0);
  options.min_p = 0.2;
  EXPECT_EQ(draw(options, logits, 2000).count(0), 0u);
  EXPECT_EQ(draw(options, logits, 2000).count(2), 1u);
  options.min_p = 1.0;
  EXPECT_EQ(draw(options, logits, 200).size(), 1u);
}

TEST(Sampler, RepetitionPenaltyKnowsPromptAndAnswer) {
  GenerateOptions options = warm(0.0);
  options.repetition_penalty = 2.0;
  const std::vector<std::int32_t> prompt = {0};
  Sampler sampler(options, prompt, 4);
  const std::vector<float> logits = {4.0f, 3.0f, 1.0f, -1.0f};
  EXPECT_EQ(sampler.sample(logits), 1);  // 0 counts 2 now
  EXPECT_EQ(sampler.sample(logits), 0);  // 1 counts 1.5
  const std::vector<float> negative = {-1.0f, -1.5f, -9.0f, -1.9f};
  EXPECT_EQ(sampler.sample(negative), 3);  // 0 counts -2, 1 counts -3
}

TEST(Sampler, LogitBiasForbidsAndForces) {
  GenerateOptions options = warm(0.0);
  options.logit_bias = {{1, -kInf}, {2, 1.5f}};
  Sampler sampler(options, {}, 3);
  EXPECT_EQ(sampler.sample(std::vector<float>{1.0f, 9.0f, 0.0f}), 2);
  options.logit_bias = {{0, -kInf}, {1, -kInf}, {2, -kInf}};
  Sampler nothing(options, {}, 3);
  EXPECT_THROW(nothing.sample(std::vector<float>{1.0f, 9.0f, 0.0f}), Error);
}

TEST(Sampler, LogprobsAreOfTheRawDistribution) {
  const std::vector<float> logits = {std::log(1.0f), std::log(8.0f), std::nanf(""), std::log(2.0f)};
  const TokenLogprobs result = token_logprobs(logits, 0, 2);
  EXPECT_EQ(result.chosen.id, 0);
  EXPECT_NEAR(result.chosen.logprob, std::log(1.0 / 11.0), 1e-6);
  ASSERT_EQ(result.top.size(), 2u);
  EXPECT_EQ(result.top[0].id, 1);
  EXPECT_NEAR(result.top[0].logprob, std::log(8.0 / 11.0), 1e-6);
  EXPECT_EQ(result.top[1].id, 3);
  EXPECT_EQ(token_logprobs(logits, 0, 20).top.size(), 4u);
}

TEST(Sampler, SameSeedSameTokens) {
  const std::vector<float> logits(50, 0.0f);
  Sampler a(warm(1.0), {}, 50);
  Sampler b(warm(1.0), {}, 50);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(a.sample(logits), b.sample(logits));
}

TEST(Sampler, SurvivesInfiniteLogits) {
  EXPECT_EQ(draw(warm(1.0), {0.0f, kInf, -kInf}, 100).count(1), 1u);
}

TEST(Sampler, OptionsOutOfRangeNameTheParameter) {
  const auto parameter = [](const GenerateOptions& options) -> std::string {
    try {
      check_options(options, 100);
    } catch (const ParameterError& error) {
      return error.parameter();
    }
    return "";
  };
  EXPECT_EQ(parameter(warm(1.0)), "");
  EXPECT_EQ(parameter(warm(-0.1)), "temperature");
  EXPECT_EQ(parameter(warm(std::nan(""))), "temperature");
  EXPECT_EQ(parameter(warm(1.0, -1)), "top_k");
  EXPECT_EQ(parameter(warm(1.0, 0, 0.0)), "top_p");
  EXPECT_EQ(parameter(warm(1.0, 0, 1.5)), "top_p");
  EXPECT_EQ(parameter(warm(1.0, 0, std::nan(""))), "top_p");
  GenerateOptions options;
  options.max_tokens = 0;
  EXPECT_EQ(parameter(options), "max_tokens");
  options.max_tokens = 1;
  options.min_p = 1.1;
  EXPECT_EQ(parameter(options), "min_p");
  options.min_p = 0.0;
  options.repetition_penalty = 0.0;
  EXPECT_EQ(parameter(options), "repetition_penalty");
  options.repetition_penalty = 1.0;
  options.logprobs = 21;
  EXPECT_EQ(parameter(options), "logprobs");
  options.logprobs = 0;
  options.logit_bias = {{100, 1.0f}};
  EXPECT_EQ(parameter(options), "logit_bias");
  options.logit_bias = {{1, kInf}};
  EXPECT_EQ(parameter(options), "logit_bias");
  options.logit_bias = {};
  options.stop_ids = {100};
  EXPECT_EQ(parameter(options), "stop_ids");
}

}  // namespace
}  // namespace dsfp4::engine
