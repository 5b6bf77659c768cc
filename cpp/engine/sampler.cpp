#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <numeric>
#include <string>

#include "dsfp4/error.h"

namespace dsfp4::engine {
namespace {

constexpr int kMaxLogprobs = 20;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

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
  require(options.min_p >= 0.0 && options.min_p <= 1.0, "min_p",
          "must be between 0 (off) and 1, not " + std::to_string(options.min_p));
  require(options.repetition_penalty > 0.0 && options.repetition_penalty <= 100.0,
          "repetition_penalty",
          "must be over 0 and at most 100 (1 is off), not " +
              std::to_string(options.repetition_penalty));
  require(options.logprobs >= 0 && options.logprobs <= kMaxLogprobs, "logprobs",
          "must be 0 (off) to " + std::to_string(kMaxLogprobs) + ", not " +
              std::to_string(options.logprobs));
  const auto require_id = [&](std::int32_t id, const char* parameter) {
    require(id >= 0 && id < vocab_size, parameter,
            "token id " + std::to_string(id) + " is outside the vocabulary of " +
                std::to_string(vocab_size));
  };
  if (options.stop_ids) {
    for (const std::int32_t id : *options.stop_ids) require_id(id, "stop_ids");
  }
  for (const auto& [id, bias] : options.logit_bias) {
    require_id(id, "logit_bias");
    require(!std::isnan(bias) && bias != std::numeric_limits<float>::infinity(), "logit_bias",
            "of token " + std::to_string(id) + " must be a number below infinity");
  }
}

double Random::uniform() {
  std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1.0p-53;
}

Sampler::Sampler(const GenerateOptions& options, std::span<const std::int32_t> prompt,
                 std::int64_t vocab_size)
    : options_(options), random_(options.seed), seen_(static_cast<std::size_t>(vocab_size)) {
  for (const std::int32_t id : prompt) seen_[static_cast<std::size_t>(id)] = true;
  if (!options.logit_bias.empty()) bias_.resize(static_cast<std::size_t>(vocab_size));
  for (const auto& [id, bias] : options.logit_bias) bias_[static_cast<std::size_t>(id)] += bias;
}

std::int32_t Sampler::sample(std::span<const float> logits) {
  collect(logits);
  const std::int32_t id = choose();
  seen_[static_cast<std::size_t>(id)] = true;
  return id;
}

std::optional<ops::SampleSpec> Sampler::draw() {
  if (options_.repetition_penalty != 1.0 || !bias_.empty() || options_.logprobs > 0) {
    return std::nullopt;
  }
  const double uniform = options_.temperature == 0.0 ? 0.0 : random_.uniform();
  return ops::SampleSpec{options_.temperature, options_.top_k, options_.top_p, options_.min_p,
                         uniform};
}

void Sampler::collect(std::span<const float> logits) {
  const auto penalty = static_cast<float>(options_.repetition_penalty);
  candidates_.clear();
  for (std::size_t id = 0; id < logits.size(); ++id) {
    float logit = logits[id];
    if (penalty != 1.0f && seen_[id]) logit = logit > 0.0f ? logit / penalty : logit * penalty;
    if (!bias_.empty()) logit += bias_[id];
    if (std::isnan(logit) || logit == -kInfinity) continue;
    candidates_.push_back({static_cast<std::int32_t>(id), logit, 0.0});
  }
  if (candidates_.empty()) {
    throw Error("no token can be chosen: every logit is NaN or forbidden by logit_bias");
  }
}

std::int32_t Sampler::choose() {
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
    c.probability = c.logit == largest ? 1.0 : std::exp((c.logit - largest) / options_.temperature);
  }
  keep_top_p();
  keep_min_p();

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

void Sampler::keep_min_p() {
  const double least = options_.min_p * candidates_.front().probability;
  std::erase_if(candidates_, [&](const Candidate& c) { return c.probability < least; });
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

TokenLogprobs token_logprobs(std::span<const float> raw_logits, std::int32_t chosen, int count) {
  std::vector<float> logits(raw_logits.begin(), raw_logits.end());
  for (float& logit : logits) logit = std::isnan(logit) ? -kInfinity : logit;
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0.0;
  for (const float logit : logits) sum += std::exp(logit - largest);
  const double normalizer = largest + std::log(sum);
  const auto logprob = [&](std::int32_t id) -> TokenLogprob {
    return {id, static_cast<float>(logits[static_cast<std::size_t>(id)] - normalizer)};
  };
  std::vector<std::int32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  const auto wanted = std::min(ids.begin() + count, ids.end());
  std::partial_sort(ids.begin(), wanted, ids.end(), [&](std::int32_t a, std::int32_t b) {
    const float x = logits[static_cast<std::size_t>(a)];
    const float y = logits[static_cast<std::size_t>(b)];
    return x != y ? x > y : a < b;
  });
  TokenLogprobs result{logprob(chosen), {}};
  std::transform(ids.begin(), wanted, std::back_inserter(result.top), logprob);
  return result;
}

}  // namespace dsfp4::engine
