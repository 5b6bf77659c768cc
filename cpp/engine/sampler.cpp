#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "dsfp4/error.h"

namespace dsfp4::engine {
namespace {

void require(bool ok, const char* parameter, const std::string& problem) {
  if (!ok) throw ParameterError(parameter, problem);
}

}  // namespace

void check_options(const GenerateOptions& options, std::int64_t vocab_size) {
  require(options.max_tokens >= 1, "max_tokens",
          "must be at least 1, not " + std::to_string(options.max_tokens));
  require(options.temperature >= 0.0 && options.temperature <= 100.0, "temperature",
          "must be between 0 (greedy) and 100, not " + std::to_string(options.temperature));
  require(options.top_k >= 0, "top_k",
          "must be 0 (off) or more, not " + std::to_string(options.top_k));
  require(options.top_p > 0.0 && options.top_p <= 1.0, "top_p",
          "must be over 0 and at most 1 (off), not " + std::to_string(options.top_p));
  if (options.stop_ids) {
    for (const std::int32_t id : *options.stop_ids) {
      require(id >= 0 && id < vocab_size, "stop_ids",
              "token id " + std::to_string(id) + " is outside the vocabulary of " +
                  std::to_string(vocab_size));
    }
  }
}

double Random::uniform() {
  std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1.0p-53;
}

std::int32_t Sampler::sample(std::span<const float> logits) {
  candidates_.clear();
  for (std::size_t id = 0; id < logits.size(); ++id) {
    if (!std::isnan(logits[id])) {
      candidates_.push_back({static_cast<std::int32_t>(id), logits[id], 0.0});
    }
  }
  if (candidates_.empty()) {
    throw Error("every logit is NaN: the model's weights or the computation are broken");
  }
  const auto better = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
  };
  if (options_.temperature == 0.0) {
    return std::min_element(candidates_.begin(), candidates_.end(), better)->id;
  }
  std::sort(candidates_.begin(), candidates_.end(), better);
  keep_top_k();
  const double largest = candidates_.front().logit;
  for (Candidate& c : candidates_) {
    // Equal infinities would give NaN.
    c.probability =
        c.logit == largest ? 1.0 : std::exp((c.logit - largest) / options_.temperature);
  }
  keep_top_p();

  double total = 0.0;
  for (const Candidate& c : candidates_) total += c.probability;
  double left = random_.uniform() * total;
  for (const Candidate& c : candidates_) {
    left -= c.probability;
    if (left < 0.0) return c.id;
  }
  return candidates_.front().id;
}

void Sampler::keep_top_k() {
  const auto top_k = static_cast<std::size_t>(options_.top_k);
  if (top_k > 0 && top_k < candidates_.size()) candidates_.resize(top_k);
}

void Sampler::keep_top_p() {
  if (options_.top_p >= 1.0) return;
  double total = 0.0;
  for (const Candidate& c : candidates_) total += c.probability;
  double kept = 0.0;
  for (std::size_t i = 0; i < candidates_.size(); ++i) {
    kept += candidates_[i].probability;
    if (kept >= options_.top_p * total) {
      candidates_.resize(i + 1);
      return;
    }
  }
}

}  // namespace dsfp4::engine
