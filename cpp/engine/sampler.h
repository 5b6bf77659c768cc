// Chooses the next token from logits.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <vector>

#include "dsfp4/model.h"
#include "engine/token_choice.h"
#include "ops/ops.h"

namespace dsfp4::engine {

/// Throws ParameterError that names the field for a value outside its documented range.
void check_options(const GenerateOptions& options, std::int64_t vocab_size);

/// A small generator with a fixed sequence for a seed on every platform (SplitMix64, Steele et al.
/// 2014).
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  /// Uniform in [0, 1), 53 bits.
  double uniform();

 private:
  std::uint64_t state_;
};

class Sampler {
 public:
  /// `prompt` counts for the repetition penalty. The options must have passed check_options.
  Sampler(const GenerateOptions& options, std::span<const std::int32_t> prompt,
          std::int64_t vocab_size);

  /// Repetition penalty, logit bias, temperature, top_k, top_p, min_p, then one draw; the lower id
  /// wins a tie. Throws Error if every logit is NaN or forbidden.
  std::int32_t sample(std::span<const float> logits);
  /// The next draw, for ops that sample by themselves; none if the options need more than
  /// temperature, top_k, top_p and min_p.
  std::optional<ops::SampleSpec> draw();

 private:
  /// The next draw.
  ops::SampleSpec spec();
  void see(std::int32_t id);
  /// `logits` after repetition penalty and bias.
  std::span<const float> adjust(std::span<const float> logits);

  GenerateOptions options_;
  Random random_;
  std::vector<bool> seen_;  // by token id: in the prompt or the answer
  std::vector<std::int32_t> seen_ids_;
  std::map<std::int32_t, float> bias_;  // by token id
  std::vector<float> adjusted_;
  TokenChooser chooser_;
};

/// Log probabilities of `chosen` and of the `count` likeliest tokens under softmax(logits).
TokenLogprobs token_logprobs(std::span<const float> logits, std::int32_t chosen, int count);

}  // namespace dsfp4::engine
