#include "model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace dsfp4::model {
namespace {

// The pair whose wave makes `turns` turns over the original context.
double pair_with_turns(double turns, std::int64_t dim, double theta, std::int64_t context) {
  return static_cast<double>(dim) *
         std::log(static_cast<double>(context) / (turns * 2.0 * std::numbers::pi)) /
         (2.0 * std::log(theta));
}

}  // namespace

RopeSpec rope_spec(const checkpoint::ModelConfig& config) {
  const std::int64_t dim = config.qk_rope_head_dim;
  RopeSpec rope;
  for (std::int64_t i = 0; i < dim; i += 2) {
    const double exponent = static_cast<double>(i) / static_cast<double>(dim);
    rope.inverse_frequency.push_back(std::pow(config.rope_theta, -exponent));
  }
  if (!config.yarn) return rope;

  // Fast waves stay, slow waves are interpolated, a ramp lies between.
  const checkpoint::YarnConfig& yarn = *config.yarn;
  const std::int64_t context = yarn.original_max_position_embeddings;
  const double low =
      std::max(std::floor(pair_with_turns(yarn.beta_fast, dim, config.rope_theta, context)), 0.0);
  double high =
      std::min(std::ceil(pair_with_turns(yarn.beta_slow, dim, config.rope_theta, context)),
               static_cast<double>(dim - 1));
  if (low == high) high += 0.001;
  for (std::size_t i = 0; i < rope.inverse_frequency.size(); ++i) {
    const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    double& frequency = rope.inverse_frequency[i];
    frequency = frequency / yarn.factor * ramp + frequency * (1.0 - ramp);
  }
  rope.amplitude = yarn.amplitude();
  return rope;
}

float softmax_scale(const checkpoint::ModelConfig& config) {
  double scale =
      1.0 / std::sqrt(static_cast<double>(config.qk_nope_head_dim + config.qk_rope_head_dim));
  if (config.yarn && config.yarn->mscale_all_dim != 0.0) {
    const double m = checkpoint::yarn_mscale(config.yarn->factor, config.yarn->mscale_all_dim);
    scale *= m * m;
  }
  return static_cast<float>(scale);
}

std::vector<float> cos_sin_of(const RopeSpec& rope, std::span<const std::int64_t> positions) {
  std::vector<float> values;
  values.reserve(positions.size() * rope.inverse_frequency.size() * 2);
  for (const std::int64_t position : positions) {
    for (const double frequency : rope.inverse_frequency) {
      const double angle = static_cast<double>(position) * frequency;
      values.push_back(static_cast<float>(std::cos(angle) * rope.amplitude));
      values.push_back(static_cast<float>(std::sin(angle) * rope.amplitude));
    }
  }
  return values;
}

}  // namespace dsfp4::model
