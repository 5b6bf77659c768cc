#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
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
  for (const std::int32_t id : prompt) see(id);
  for (const auto& [id, bias] : options.logit_bias) bias_[id] += bias;
}

std::int32_t Sampler::sample(std::span<const float> logits) {
  const std::int32_t id = chooser_.choose(adjust(logits), spec());
  if (id < 0) throw Error("no token can be chosen: every logit is NaN or forbidden by logit_bias");
  see(id);
  return id;
}

std::optional<ops::SampleSpec> Sampler::draw() {
  if (options_.repetition_penalty != 1.0 || !bias_.empty() || options_.logprobs > 0) {
    return std::nullopt;
  }
  return spec();
}

ops::SampleSpec Sampler::spec() {
  const double uniform = options_.temperature == 0.0 ? 0.0 : random_.uniform();
  return {options_.temperature, options_.top_k, options_.top_p, options_.min_p, uniform};
}

void Sampler::see(std::int32_t id) {
  if (seen_[static_cast<std::size_t>(id)]) return;
  seen_[static_cast<std::size_t>(id)] = true;
  seen_ids_.push_back(id);
}

std::span<const float> Sampler::adjust(std::span<const float> logits) {
  const auto penalty = static_cast<float>(options_.repetition_penalty);
  if (penalty == 1.0f && bias_.empty()) return logits;
  adjusted_.assign(logits.begin(), logits.end());
  if (penalty != 1.0f) {
    for (const std::int32_t id : seen_ids_) {
      float& logit = adjusted_[static_cast<std::size_t>(id)];
      logit = logit > 0.0f ? logit / penalty : logit * penalty;
    }
  }
  for (const auto& [id, bias] : bias_) adjusted_[static_cast<std::size_t>(id)] += bias;
  return adjusted_;
}

TokenLogprobs token_logprobs(std::span<const float> logits, std::int32_t chosen, int count) {
  const auto known = [](float logit) { return std::isnan(logit) ? -kInfinity : logit; };
  const std::vector<Candidate> best = best_of(logits, std::max(count, 1));
  const double largest = best.front().logit;
  double sum = 0.0;
  for (const float logit : logits) sum += std::exp(known(logit) - largest);
  const double normalizer = largest + std::log(sum);
  const auto logprob = [&](float logit, std::int32_t id) -> TokenLogprob {
    return {id, static_cast<float>(logit - normalizer)};
  };
  TokenLogprobs result{logprob(known(logits[static_cast<std::size_t>(chosen)]), chosen), {}};
  for (const Candidate& c :
       std::span(best).first(std::min<std::size_t>(static_cast<std::size_t>(count), best.size()))) {
    result.top.push_back(logprob(c.logit, c.id));
  }
  return result;
}

}  // namespace dsfp4::engine
