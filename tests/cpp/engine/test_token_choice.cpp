// The quick ways to a token against the rule itself: sort everything, then add up.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "engine/token_choice.h"

namespace dsfp4::engine {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Weighted {
  std::int32_t id;
  float logit;
  double probability;
};

// As it is written down in token_choice.h.
std::int32_t by_the_rule(const std::vector<float>& logits, const ops::SampleSpec& spec) {
  std::vector<Weighted> all;
  for (std::size_t id = 0; id < logits.size(); ++id) {
    if (std::isnan(logits[id]) || logits[id] == -kInf) continue;
    all.push_back({static_cast<std::int32_t>(id), logits[id], 0.0});
  }
  if (all.empty()) return -1;
  std::sort(all.begin(), all.end(), [](const Weighted& a, const Weighted& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
  });
  if (spec.temperature == 0.0) return all.front().id;
  if (spec.top_k > 0 && static_cast<std::size_t>(spec.top_k) < all.size()) {
    all.resize(static_cast<std::size_t>(spec.top_k));
  }
  const double largest = all.front().logit;
  for (Weighted& w : all) {
    w.probability = w.logit == largest ? 1.0 : std::exp((w.logit - largest) / spec.temperature);
  }
  if (spec.top_p < 1.0) {
    double total = 0.0;
    for (const Weighted& w : all) total += w.probability;
    double kept = 0.0;
    for (std::size_t i = 0; i < all.size(); ++i) {
      kept += all[i].probability;
      if (kept >= spec.top_p * total) all.resize(i + 1);
    }
  }
  std::erase_if(all, [&](const Weighted& w) { return w.probability < spec.min_p; });
  double total = 0.0;
  for (const Weighted& w : all) total += w.probability;
  double left = spec.uniform * total;
  for (const Weighted& w : all) {
    left -= w.probability;
    if (left < 0.0) return w.id;
  }
  return all.front().id;
}

/// Logits of many kinds, from what a model gives to what none should.
std::vector<float> make_logits(int kind, std::size_t count, std::mt19937& bits) {
  std::normal_distribution<float> normal(0.0f, 1.0f);
  std::vector<float> logits(count);
  for (float& logit : logits) {
    const float x = normal(bits);
    switch (kind) {
      case 0:
        logit = 3.0f * x;
        break;
      case 1:
        logit = std::round(2.0f * x);
        break;  // ties
      case 2:
        logit = 1.0f;
        break;  // nothing but ties
      case 3:
        logit = 0.01f * x;
        break;  // nearly flat
      case 4:
        logit = x * std::exp(8.0f * normal(bits));
        break;  // far apart
      case 5:
        logit = 1e38f * x;
        break;  // sums that overflow FP32
      default:
        logit = 1e-42f * x;
        break;  // denormal
    }
  }
  if (kind % 2 == 1) {
    for (std::size_t i = 0; i < count; i += 7) logits[i] = std::nanf("");
    for (std::size_t i = 3; i < count; i += 11) logits[i] = -kInf;
  }
  if (kind == 0) logits[count / 2] = 14.0f;  // a likely one
  return logits;
}

constexpr int kKinds = 7;

TEST(TokenChoice, IsThatOfTheRule) {
  std::mt19937 bits(7);
  TokenChooser chooser;
  const double temperatures[] = {0.0, 1e-300, 1e-3, 0.3, 1.0, 1.7, 100.0};
  const std::int64_t top_ks[] = {0, 1, 50, 1500, 100000};
  const double top_ps[] = {1.0, 0.95, 0.3, 1e-9, 0.999999999999};
  const double min_ps[] = {0.0, 0.05, 1.0, 1e-12};
  const auto any = [&](const auto& list) { return list[bits() % std::size(list)]; };
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  for (int round = 0; round < 1500; ++round) {
    const int kind = static_cast<int>(bits() % kKinds);
    const std::size_t count = round % 3 == 0 ? 1 + bits() % 40 : 1000 + bits() % 5000;
    const std::vector<float> logits = make_logits(kind, count, bits);
    ops::SampleSpec spec{any(temperatures), any(top_ks), any(top_ps), any(min_ps), 0.0};
    for (int draw = 0; draw < 4; ++draw) {
      spec.uniform = draw == 3 ? 0.0 : uniform(bits);
      ASSERT_EQ(chooser.choose(logits, spec), by_the_rule(logits, spec))
          << "kind " << kind << " count " << count << " temperature " << spec.temperature
          << " top_k " << spec.top_k << " top_p " << spec.top_p << " min_p " << spec.min_p
          << " uniform " << spec.uniform;
    }
  }
}

TEST(TokenChoice, OfTheSizesThatModelsHave) {
  std::mt19937 bits(3);
  TokenChooser chooser;
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  for (int kind = 0; kind < kKinds; ++kind) {
    const std::vector<float> logits = make_logits(kind, 129280, bits);
    for (const ops::SampleSpec& spec : {ops::SampleSpec{1.0},
                                        {0.6, 0, 0.949999},
                                        {1.0, 50},
                                        {1.0, 100000, 0.990005},
                                        {1.0, 0, 1.0, 0.02}}) {
      ops::SampleSpec drawn = spec;
      drawn.uniform = uniform(bits);
      ASSERT_EQ(chooser.choose(logits, drawn), by_the_rule(logits, drawn)) << kind;
    }
  }
  EXPECT_EQ(chooser.sorted(), 0) << "borders are rarely near";
}

// Sums that end exactly at a draw or at top_p: which side rounding falls on is the rule's to say.
TEST(TokenChoice, OnTheBordersIsThatOfTheRule) {
  TokenChooser chooser;
  for (const float spread : {0.0f, 0.25f}) {
    std::vector<float> logits(3001);
    for (std::size_t i = 0; i < logits.size(); ++i) {
      logits[i] = spread * static_cast<float>(i * 7 % 5);
    }
    for (int i = 0; i <= 60; ++i) {
      const double share = static_cast<double>(50 * i) / 3001.0;
      const ops::SampleSpec draw{1.0, 0, 1.0, 0.0, share};
      ASSERT_EQ(chooser.choose(logits, draw), by_the_rule(logits, draw)) << i;
      const ops::SampleSpec cut{1.0, 0, std::max(share, 1e-9), 0.0, 1.0 - 0x1p-53};
      ASSERT_EQ(chooser.choose(logits, cut), by_the_rule(logits, cut)) << i;
    }
  }
  EXPECT_GT(chooser.sorted(), 60);
}

TEST(TokenChoice, InfinitiesAndNothing) {
  TokenChooser chooser;
  std::vector<float> logits(3000, 0.0f);
  logits[40] = logits[2000] = kInf;
  for (const double uniform : {0.0, 0.4, 0.6, 1.0 - 0x1p-53}) {
    for (const std::int64_t top_k : {0, 1, 2, 500}) {
      const ops::SampleSpec spec{1.0, top_k, 0.9, 0.0, uniform};
      EXPECT_EQ(chooser.choose(logits, spec), by_the_rule(logits, spec));
    }
  }
  EXPECT_EQ(chooser.choose(std::vector<float>(9, std::nanf("")), {}), -1);
  EXPECT_EQ(chooser.choose(std::vector<float>(9, -kInf), {1.0}), -1);
}

TEST(TokenChoice, TheBestAreInOrderWithTiesById) {
  std::mt19937 bits(5);
  for (int kind = 0; kind < kKinds; ++kind) {
    const std::vector<float> logits = make_logits(kind, 500, bits);
    std::vector<Candidate> all;
    for (std::size_t id = 0; id < logits.size(); ++id) {
      all.push_back({std::isnan(logits[id]) ? -kInf : logits[id], static_cast<std::int32_t>(id)});
    }
    std::sort(all.begin(), all.end(), better);
    const std::vector<Candidate> best = best_of(logits, 20);
    ASSERT_EQ(best.size(), 20U);
    for (std::size_t i = 0; i < best.size(); ++i) EXPECT_EQ(best[i].id, all[i].id);
  }
  EXPECT_TRUE(best_of(std::vector<float>{1.0f}, 0).empty());
  EXPECT_EQ(best_of(std::vector<float>{1.0f}, 20).size(), 1U);
}

}  // namespace
}  // namespace dsfp4::engine
