// One token out of logits: temperature, top_k, top_p, min_p and a draw.
//
// The rule: sort the candidates, better() first; keep the top_k; p = exp((logit - largest) /
// temperature); keep the first whose p add up to top_p of all; drop p < min_p; the token is the
// first whose p, added in that order, pass uniform * total. Sorting a vocabulary costs ten times as
// much as all the rest, so sums are first taken in any order. Those decide wherever the answer is
// further from a border than both ways of adding can differ; else the vocabulary is sorted after
// all. So the token is that of the rule, whatever way it was found.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "ops/ops.h"

namespace dsfp4::engine {

struct Candidate {
  float logit;
  std::int32_t id;
};

/// By logit, the lower id in a tie.
inline bool better(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

class TokenChooser {
 public:
  /// The token, or -1 if every logit is NaN or -infinity. `spec` holds what check_options allows.
  std::int32_t choose(std::span<const float> logits, const ops::SampleSpec& spec);

  /// Times that a vocabulary was sorted because a border was too near.
  std::int64_t sorted() const noexcept { return sorted_; }

 private:
  /// Without top_k. `source`: candidates by id, of which `largest` is the best logit.
  template <typename Source>
  std::int32_t choose_among(const Source& source, ops::SampleSpec spec, float largest);
  std::int32_t by_the_rule(std::vector<Candidate> candidates, const ops::SampleSpec& spec);

  std::int64_t sorted_ = 0;
};

/// The `count` best, in order; NaN counts as -infinity.
std::vector<Candidate> best_of(std::span<const float> logits, std::int64_t count);

}  // namespace dsfp4::engine
