// Chooses the next token from logits.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "dsfp4/model.h"

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
  explicit Sampler(const GenerateOptions& options)
      : options_(options), random_(options.seed) {}

  /// Temperature, then top_k, then top_p, then one draw; the lower id wins a tie. Throws Error if
  /// every logit is NaN.
  std::int32_t sample(std::span<const float> logits);

 private:
  struct Candidate {
    std::int32_t id;
    float logit;
    double probability;
  };
  void keep_top_k();
  void keep_top_p();

  GenerateOptions options_;
  Random random_;
  std::vector<Candidate> candidates_;
};

}  // namespace dsfp4::engine
