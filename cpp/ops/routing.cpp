#include "ops/routing.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "dsfp4/error.h"

namespace dsfp4::ops {
namespace {

constexpr float kDropped = -std::numeric_limits<float>::infinity();

std::vector<float> scores_of(const RouterSpec& spec, std::span<const float> logits) {
  std::vector<float> scores(logits.size());
  if (spec.scoring == RouterSpec::Scoring::kSigmoid) {
    std::transform(logits.begin(), logits.end(), scores.begin(), [](float x) {
      return static_cast<float>(1.0 / (1.0 + std::exp(-static_cast<double>(x))));
    });
    return scores;
  }
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0.0;
  for (const float x : logits) sum += std::exp(x - largest);
  std::transform(logits.begin(), logits.end(), scores.begin(),
                 [&](float x) { return static_cast<float>(std::exp(x - largest) / sum); });
  return scores;
}

// Indices of the `count` largest values, best first; the lower index wins a tie. NaN ranks last.
std::vector<std::int32_t> best_of(std::span<const float> values, std::int64_t count) {
  std::vector<std::int32_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  const auto better = [&](std::int32_t a, std::int32_t b) {
    const float x = values[static_cast<std::size_t>(a)];
    const float y = values[static_cast<std::size_t>(b)];
    if (std::isnan(x) != std::isnan(y)) return std::isnan(y);
    if (x != y && !std::isnan(x)) return x > y;
    return a < b;
  };
  std::partial_sort(order.begin(), order.begin() + count, order.end(), better);
  order.resize(static_cast<std::size_t>(count));
  return order;
}

float group_score(RouterSpec::GroupScore kind, std::span<const float> members) {
  float first = kDropped;
  float second = kDropped;
  for (const float x : members) {
    if (x > first) {
      second = std::exchange(first, x);
    } else {
      second = std::max(second, x);
    }
  }
  return kind == RouterSpec::GroupScore::kMax ? first : first + second;
}

void drop_weak_groups(const RouterSpec& spec, std::vector<float>& selection) {
  if (spec.kept_groups >= spec.groups) return;
  const auto width = static_cast<std::size_t>(spec.experts / spec.groups);
  std::vector<float> group(static_cast<std::size_t>(spec.groups));
  for (std::size_t g = 0; g < group.size(); ++g) {
    group[g] = group_score(spec.group_score, std::span(selection).subspan(g * width, width));
  }
  std::vector<bool> kept(group.size(), false);
  for (const std::int32_t g : best_of(group, spec.kept_groups)) {
    kept[static_cast<std::size_t>(g)] = true;
  }
  for (std::size_t e = 0; e < selection.size(); ++e) {
    if (!kept[e / width]) selection[e] = kDropped;
  }
}

}  // namespace

void check_router(const RouterSpec& spec, std::size_t logits, std::size_t bias) {
  const auto require = [](bool ok, const char* parameter, const std::string& problem) {
    if (!ok) throw ParameterError(parameter, problem);
  };
  require(spec.experts >= 1, "experts", "must be at least 1");
  require(logits == static_cast<std::size_t>(spec.experts), "logits",
          "a row must have one value for each of " + std::to_string(spec.experts) + " experts");
  require(bias == 0 || bias == logits, "bias", "must be empty or have one value an expert");
  require(spec.groups >= 1 && spec.experts % spec.groups == 0, "groups",
          "must divide the number of experts");
  require(spec.kept_groups >= 1 && spec.kept_groups <= spec.groups, "kept_groups",
          "must be between 1 and groups");
  require(spec.top_k >= 1 && spec.top_k <= spec.experts / spec.groups * spec.kept_groups, "top_k",
          "must be between 1 and the number of experts in the kept groups");
}

void check_forced(const RouterSpec& spec, std::span<const std::int32_t> forced) {
  const auto top_k = static_cast<std::size_t>(spec.top_k);
  for (std::size_t p = 0; p < forced.size(); ++p) {
    const std::int32_t expert = forced[p];
    if (expert < 0 || expert >= spec.experts) {
      throw ParameterError("experts", "expert " + std::to_string(expert) + " is not one of 0.." +
                                          std::to_string(spec.experts - 1));
    }
    const auto before = forced.subspan(p - p % top_k, p % top_k);
    if (std::ranges::find(before, expert) != before.end()) {
      throw ParameterError("experts", "expert " + std::to_string(expert) +
                                          " is named twice for token " + std::to_string(p / top_k));
    }
  }
}

void route_token(const RouterSpec& spec, std::span<const float> logits, std::span<const float> bias,
                 std::span<const std::int32_t> forced, std::span<std::int32_t> own,
                 std::span<std::int32_t> used, std::span<float> weights) {
  const std::vector<float> scores = scores_of(spec, logits);
  std::vector<float> selection = scores;
  if (!bias.empty()) {
    std::transform(selection.begin(), selection.end(), bias.begin(), selection.begin(),
                   std::plus<>());
  }
  drop_weak_groups(spec, selection);
  std::ranges::copy(best_of(selection, spec.top_k), own.begin());

  const auto top_k = static_cast<std::size_t>(spec.top_k);
  double sum = 0.0;
  for (std::size_t k = 0; k < top_k; ++k) {
    used[k] = forced.empty() ? own[k] : forced[k];
    weights[k] = scores[static_cast<std::size_t>(used[k])];
    sum += weights[k];
  }
  const double divisor = spec.normalize ? sum + 1e-20 : 1.0;
  for (std::size_t k = 0; k < top_k; ++k) {
    weights[k] = static_cast<float>(weights[k] / divisor * spec.scaling_factor);
  }
}

}  // namespace dsfp4::ops
