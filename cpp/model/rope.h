// Rotary position embedding with YaRN, from the configuration.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "checkpoint/config.h"
#include "model/spec.h"

namespace dsfp4::model {

/// Inverse frequencies and amplitude. Source: YaRN (Peng et al. 2023), with DeepSeek's ramp bounds.
RopeSpec rope_spec(const checkpoint::ModelConfig& config);

/// (nope + rope)^-0.5, times m^2 with m = 0.1 mscale_all_dim ln(factor) + 1 where YaRN gives
/// mscale_all_dim. Source: DeepSeek-V2's modelling code.
float softmax_scale(const checkpoint::ModelConfig& config);

/// [cos_0, sin_0, cos_1, ...] of each position, one row after the other.
std::vector<float> cos_sin_of(const RopeSpec& rope, std::span<const std::int64_t> positions);

}  // namespace dsfp4::model
