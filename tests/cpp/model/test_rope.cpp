#include <cmath>

#include <gtest/gtest.h>

#include "model/rope.h"

namespace dsfp4::model {
namespace {

checkpoint::ModelConfig published(double mscale) {
  checkpoint::ModelConfig config;
  config.qk_nope_head_dim = 128;
  config.qk_rope_head_dim = 64;
  config.rope_theta = 10000.0;
  config.yarn = checkpoint::YarnConfig{40.0, 32.0, 1.0, mscale, mscale, 4096};
  return config;
}

TEST(Rope, PublishedSoftmaxScales) {
  EXPECT_NEAR(softmax_scale(published(1.0)), 0.1352338f, 1e-7f);    // V3
  EXPECT_NEAR(softmax_scale(published(0.707)), 0.1147214f, 1e-7f);  // V2
  checkpoint::ModelConfig plain = published(1.0);
  plain.yarn.reset();
  EXPECT_FLOAT_EQ(softmax_scale(plain), 1.0f / std::sqrt(192.0f));
}

TEST(Rope, RampOfV3RunsFromPair10To23) {
  const RopeSpec rope = rope_spec(published(1.0));
  const auto original = [](int i) { return std::pow(10000.0, -i / 32.0); };
  ASSERT_EQ(rope.inverse_frequency.size(), 32u);
  EXPECT_DOUBLE_EQ(rope.inverse_frequency[0], 1.0);
  EXPECT_DOUBLE_EQ(rope.inverse_frequency[10], original(10));
  EXPECT_LT(rope.inverse_frequency[11], original(11));
  EXPECT_GT(rope.inverse_frequency[22], original(22) / 40.0);
  EXPECT_DOUBLE_EQ(rope.inverse_frequency[23], original(23) / 40.0);
  EXPECT_DOUBLE_EQ(rope.inverse_frequency[31], original(31) / 40.0);
  EXPECT_DOUBLE_EQ(rope.amplitude, 1.0);
}

TEST(Rope, AmplitudeIsTheRatioOfTheMscales) {
  checkpoint::ModelConfig config = published(1.0);
  config.yarn->mscale = 0.5;
  const double log = std::log(40.0);
  EXPECT_DOUBLE_EQ(rope_spec(config).amplitude, (0.05 * log + 1.0) / (0.1 * log + 1.0));
  config.yarn->mscale_all_dim = 0.0;
  EXPECT_DOUBLE_EQ(rope_spec(config).amplitude, 0.1 * log + 1.0);
}

TEST(Rope, CosSinRowsInterleave) {
  RopeSpec rope;
  rope.inverse_frequency = {1.0, 0.5};
  rope.amplitude = 2.0;
  const std::int64_t positions[] = {0, 3};
  const std::vector<float> values = cos_sin_of(rope, positions);
  ASSERT_EQ(values.size(), 8u);
  EXPECT_EQ(values[0], 2.0f);
  EXPECT_EQ(values[1], 0.0f);
  EXPECT_FLOAT_EQ(values[4], static_cast<float>(2.0 * std::cos(3.0)));
  EXPECT_FLOAT_EQ(values[7], static_cast<float>(2.0 * std::sin(1.5)));
}

}  // namespace
}  // namespace dsfp4::model
