// Expert choice for one token, on the host: the same plain code for every CPU backend, because a
// router must not flip between them on anything but its logits.
#pragma once

#include <cstdint>
#include <span>

#include "ops/views.h"

namespace dsfp4::ops {

/// Throws ParameterError if the spec contradicts itself or the logits' width.
void check_router(const RouterSpec& spec, std::size_t logits, std::size_t bias);

/// Throws ParameterError unless every one of `forced`, [tokens, top_k] or empty, is an expert, and
/// those of a token differ.
void check_forced(const RouterSpec& spec, std::span<const std::int32_t> forced);

/// logits: [spec.experts]; bias: [spec.experts] or empty; forced: [top_k] or empty.
/// Writes top_k entries to each output. Sources: DeepSeek-V2 (softmax, group-limited by the best
/// expert of a group), DeepSeek-V3 (sigmoid, bias for the choice only, groups by their best two).
void route_token(const RouterSpec& spec, std::span<const float> logits, std::span<const float> bias,
                 std::span<const std::int32_t> forced, std::span<std::int32_t> own,
                 std::span<std::int32_t> used, std::span<float> weights);

}  // namespace dsfp4::ops
