// Which experts are worth their place in RAM.
//
// A policy sees every use of every expert, cached or not, and gives each a value; whoever needs
// room gives up the cached expert with the least one. One pool serves all layers, so values of
// different layers are compared. A policy's time is the tokens that a layer has seen. No policy
// knows what is cached: so a replay of a trace and the engine see the same values. Not safe to call
// from several threads at once.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "ops/ops.h"

namespace dsfp4::residency {

/// MoE layer number * experts of a layer + expert.
using ExpertKey = std::uint32_t;

class Policy {
 public:
  virtual ~Policy() = default;
  virtual std::string_view name() const noexcept = 0;

  /// One token passed MoE layer `layer` (counted from the first of them) and used `experts`;
  /// `scores` are the selection scores of all experts of the layer, in their order.
  virtual void use(std::int64_t layer, std::span<const std::int32_t> experts,
                   std::span<const float> scores) = 0;
  /// What it is worth to keep the expert: only the order of values means something.
  virtual float value(ExpertKey key) const = 0;

  /// Everything that the policy knows, as numbers for a later run's restore().
  virtual std::vector<float> state() const = 0;
  /// False, and nothing changed, if these numbers cannot be a state of this policy.
  virtual bool restore(std::span<const float> state) = 0;
};

/// "lru": the longest unused goes. "lfu": the least used, uses count 0.98 as much with each token.
/// "lrfu": recent and long-term use mixed. "router": the selection scores averaged over tokens,
/// softmax over the experts. "default": uses and scores at several horizons; see policy.cpp.
/// Throws ParameterError for another name.
std::unique_ptr<Policy> make_policy(std::string_view name, std::int64_t layers,
                                    std::int64_t experts);
std::span<const std::string_view> policy_names();

/// What a router selects by, without the group limit: sigmoid or softmax of `logits`, plus `bias`
/// (which may be empty).
void selection_scores(ops::RouterSpec::Scoring scoring, std::span<const float> logits,
                      std::span<const float> bias, std::span<float> scores);

/// The misses of a trace. `used`: [layers, tokens, top_k]; `scores`: [layers, tokens, experts].
/// The tokens pass all layers one by one; after each layer, experts are given up until at most
/// `capacity` are cached. `first`: tokens before it warm the cache and are not counted.
std::int64_t replay_misses(Policy& policy, std::int64_t layers, std::int64_t experts,
                           std::int64_t top_k, std::span<const std::int32_t> used,
                           std::span<const float> scores, std::int64_t capacity,
                           std::int64_t first);

}  // namespace dsfp4::residency
