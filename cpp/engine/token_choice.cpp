#include "engine/token_choice.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>

namespace dsfp4::engine {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::size_t kFew = 1024;  // so many candidates are sorted at once

/// The first candidate, in order, with which a sum of weights reaches a target.
struct Border {
  Candidate last{0.0f, 0};
  double before = 0.0;  // sum of the better ones
  double weight = 0.0;  // its own
};

/// A source of candidates, by id: all tokens, or some. NaN and -infinity are none.
struct AllTokens {
  std::span<const float> logits;
  std::size_t size() const { return logits.size(); }
  Candidate operator[](std::size_t i) const { return {logits[i], static_cast<std::int32_t>(i)}; }
};
using SomeTokens = std::span<const Candidate>;

/// Weights of candidates, added up in intervals of their logits, the best first. Finds a Border
/// without sorting more than the candidates of one interval.
class Intervals {
 public:
  /// By number; `width`: from the best logit to the worst.
  template <typename Source>
  void count(const Source& source, float top, double width) {
    weight_ = [](float) { return 1.0; };
    scale(top, width);
    for (std::size_t i = 0; i < source.size(); ++i) {
      const float logit = source[i].logit;
      sums_[nearest(position(logit))] += logit > -kInfinity ? 1.0 : 0.0;
    }
  }

  /// By p, to a relative error below 1e-11. An interval is as wide as makes 2^(1 / kOctave) in p,
  /// so p is a power that all of it share, times a cubic. Beyond the last interval p < 1e-28.
  template <typename Source>
  void add_up(const Source& source, float top, double temperature) {
    weight_ = [top, temperature](float logit) {
      return std::exp((logit - static_cast<double>(top)) / temperature);
    };
    constexpr double kStep = kLn2 / kOctave;
    scale(top, kStep * kLast * temperature);
    for (std::size_t i = 0; i < source.size(); ++i) {
      const double at = position(source[i].logit);
      const double rounded = at + kRound;
      const double rest = (rounded - kRound) - at;
      sums_[integer(rounded)] +=
          1.0 + rest * (kStep + rest * (kStep * kStep / 2 + rest * (kStep * kStep * kStep / 6)));
    }
    for (std::size_t i = 0; i < sums_.size(); ++i) {
      if (sums_[i] != 0.0) sums_[i] *= std::exp2(-static_cast<double>(i) / kOctave);
    }
  }

  double total() const {
    double sum = 0.0;
    for (const double weight : sums_) sum += weight;
    return sum;
  }

  template <typename Source>
  Border reach(const Source& source, double target) {
    Border border;
    std::size_t interval = walk(target, border.before);
    std::vector<Candidate> members = members_of(source, interval);
    for (;;) {
      const auto [low, high] =
          std::ranges::minmax(members, {}, [](const Candidate& c) { return c.logit; });
      if (low.logit == high.logit || members.size() <= kFew / 4) {
        // Candidates come by id, so equal logits are in order.
        if (low.logit != high.logit) std::ranges::sort(members, better);
        return walk_members(members, target, border);
      }
      scale(high.logit, static_cast<double>(high.logit) - low.logit);
      for (const Candidate& c : members) sums_[nearest(position(c.logit))] += weight_(c.logit);
      interval = walk(target, border.before);
      std::erase_if(members,
                    [&](const Candidate& c) { return nearest(position(c.logit)) != interval; });
    }
  }

 private:
  static constexpr double kLn2 = 0x1.62e42fefa39efp-1;
  static constexpr double kOctave = 128.0;
  static constexpr std::size_t kCount = 12288;
  static constexpr double kLast = kCount - 1;
  static constexpr double kRound = 0x1.8p52;  // adding it rounds to an integer, in the low bits

  static std::size_t integer(double rounded) {
    return static_cast<std::uint32_t>(std::bit_cast<std::uint64_t>(rounded));
  }
  static std::size_t nearest(double position) { return integer(position + kRound); }

  void scale(float top, double width) {
    top_ = top;
    per_logit_ = kLast / width;
    sums_.assign(kCount, 0.0);
  }
  // From 0, the best; NaN is last.
  double position(float logit) const {
    const double at = (top_ - logit) * per_logit_;
    return at < kLast ? at : kLast;
  }

  template <typename Source>
  std::vector<Candidate> members_of(const Source& source, std::size_t interval) const {
    // A comparison of two floats leaves most of them out.
    const auto logit_at = [&](double position) {
      constexpr double kMost = std::numeric_limits<float>::max();
      return static_cast<float>(std::clamp(top_ - position / per_logit_, -kMost, kMost));
    };
    const auto at = static_cast<double>(interval);
    const float high = std::nextafter(logit_at(at - 0.51), kInfinity);
    const float low = at == kLast ? -kInfinity : std::nextafter(logit_at(at + 0.51), -kInfinity);
    std::vector<Candidate> members;
    for (std::size_t i = 0; i < source.size(); ++i) {
      const Candidate c = source[i];
      if (c.logit >= low && c.logit <= high && c.logit > -kInfinity &&
          nearest(position(c.logit)) == interval) {
        members.push_back(c);
      }
    }
    return members;
  }

  // The interval in which the target is reached; adds the sums of those in front of it. Rounding
  // may leave a target beyond all of them: then the last that holds anything.
  std::size_t walk(double target, double& before) const {
    std::size_t last = 0;
    double before_last = before;
    for (std::size_t i = 0; i < sums_.size(); ++i) {
      if (sums_[i] == 0.0) continue;
      last = i;
      before_last = before;
      if (before + sums_[i] >= target) break;
      before += sums_[i];
    }
    before = before_last;
    return last;
  }

  Border walk_members(const std::vector<Candidate>& members, double target, Border border) const {
    for (const Candidate& c : members) {
      border.before += border.weight;
      border.last = c;
      border.weight = weight_(c.logit);
      if (border.before + border.weight >= target) break;
    }
    return border;
  }

  std::function<double(float)> weight_;
  double top_ = 0.0;
  double per_logit_ = 0.0;
  std::vector<double> sums_;
};

double probability(const Candidate& c, double largest, double temperature) {
  // Equal infinities would give NaN.
  return c.logit == largest ? 1.0 : std::exp((c.logit - largest) / temperature);
}

/// The target lies so near an end of the border that sums in the rule's order could decide
/// otherwise. `count` additions err by less than count * 2^-53 of the sum, here as there, and p by
/// 1e-11.
bool too_near(const Border& border, double target, double total, std::size_t count) {
  const double error = total * (static_cast<double>(count) * 1e-15 + 2e-11);
  return border.before + border.weight - target <= error ||
         (border.before > 0.0 && target - border.before <= error);
}

/// The candidates that `keep` names.
template <typename Source, typename Keep>
std::vector<Candidate> filtered(const Source& source, const Keep& keep) {
  std::vector<Candidate> kept;
  for (std::size_t i = 0; i < source.size(); ++i) {
    const Candidate c = source[i];
    if (c.logit > -kInfinity && keep(c)) kept.push_back(c);
  }
  return kept;
}

template <typename Source>
std::vector<Candidate> up_to(const Source& source, const Border& border) {
  const float least = border.last.logit;
  return filtered(source, [&](const Candidate& c) {
    return c.logit >= least && (c.logit > least || c.id <= border.last.id);
  });
}

// Only near the border p itself is needed.
template <typename Source>
std::vector<Candidate> at_least(const Source& source, double min_p, double largest,
                                double temperature) {
  const double border = std::log(min_p) * temperature;  // of logit - largest
  const double near = 1e-6 * (temperature - border);
  return filtered(source, [&](const Candidate& c) {
    const double below = c.logit - largest;
    if (std::abs(below - border) > near) return below > border;
    return probability(c, largest, temperature) >= min_p;
  });
}

std::int32_t likeliest(std::span<const float> logits) {
  Candidate best{-kInfinity, -1};
  for (std::size_t id = 0; id < logits.size(); ++id) {
    if (logits[id] > best.logit) best = {logits[id], static_cast<std::int32_t>(id)};
  }
  return best.id;
}

/// The smallest and the largest logit above -infinity.
std::pair<float, float> range_of(std::span<const float> logits) {
  constexpr std::size_t kLanes = 16;  // maxima that do not wait for each other
  std::array<float, kLanes> low, high;
  low.fill(kInfinity);
  high.fill(-kInfinity);
  std::size_t i = 0;
  for (; i + kLanes <= logits.size(); i += kLanes) {
    for (std::size_t j = 0; j < kLanes; ++j) {
      const float logit = logits[i + j];
      high[j] = logit > high[j] ? logit : high[j];
      low[j] = (logit < low[j]) & (logit > -kInfinity) ? logit : low[j];
    }
  }
  for (; i < logits.size(); ++i) {
    if (logits[i] > high[0]) high[0] = logits[i];
    if (logits[i] < low[0] && logits[i] > -kInfinity) low[0] = logits[i];
  }
  return {*std::ranges::min_element(low), *std::ranges::max_element(high)};
}

}  // namespace

std::int32_t TokenChooser::choose(std::span<const float> logits, const ops::SampleSpec& spec) {
  if (spec.temperature == 0.0) return likeliest(logits);
  const auto [smallest, largest] = range_of(logits);
  if (largest == -kInfinity) return -1;
  const AllTokens all{logits};
  constexpr double kColdest = 1e-6;  // whose inverse is harmless
  const auto top_k = static_cast<std::size_t>(spec.top_k);
  if (largest == kInfinity || spec.temperature < kColdest) {
    // All others have p = 0 by underflow.
    const double least = largest - 800.0 * spec.temperature;
    std::vector<Candidate> likely =
        filtered(all, [&](const Candidate& c) { return c.logit >= least; });
    if (top_k > 0 && top_k < likely.size()) {
      std::ranges::sort(likely, better);
      likely.resize(top_k);
    }
    return by_the_rule(std::move(likely), spec);
  }
  if (top_k > 0 && top_k < logits.size() && smallest < largest) {
    Intervals intervals;
    intervals.count(all, largest, static_cast<double>(largest) - smallest);
    const Border border = intervals.reach(all, static_cast<double>(top_k));
    return choose_among(SomeTokens(up_to(all, border)), spec, largest);
  }
  if (top_k > 0 || logits.size() <= kFew) {
    std::vector<Candidate> some = filtered(all, [](const Candidate&) { return true; });
    if (top_k > 0) some.resize(std::min(top_k, some.size()));  // all alike, or all of them
    return choose_among(SomeTokens(some), spec, largest);
  }
  return choose_among(all, spec, largest);
}

template <typename Source>
std::int32_t TokenChooser::choose_among(const Source& source, ops::SampleSpec spec, float largest) {
  const auto sorted = [&] {
    return by_the_rule(filtered(source, [](const Candidate&) { return true; }), spec);
  };
  if (source.size() <= kFew) return sorted();
  Intervals intervals;
  if (spec.top_p < 1.0) {
    intervals.add_up(source, largest, spec.temperature);
    const double total = intervals.total();
    const Border border = intervals.reach(source, spec.top_p * total);
    if (too_near(border, spec.top_p * total, total, source.size())) return sorted();
    spec.top_p = 1.0;
    return choose_among(SomeTokens(up_to(source, border)), spec, largest);
  }
  if (spec.min_p > 0.0) {
    const double min_p = std::exchange(spec.min_p, 0.0);
    return choose_among(SomeTokens(at_least(source, min_p, largest, spec.temperature)), spec,
                        largest);
  }
  intervals.add_up(source, largest, spec.temperature);
  const double total = intervals.total();
  const Border border = intervals.reach(source, spec.uniform * total);
  if (too_near(border, spec.uniform * total, total, source.size())) return sorted();
  return border.last.id;
}

std::int32_t TokenChooser::by_the_rule(std::vector<Candidate> candidates,
                                       const ops::SampleSpec& spec) {
  if (candidates.size() > kFew) ++sorted_;
  std::ranges::sort(candidates, better);
  const double largest = candidates.front().logit;
  std::vector<double> weights(candidates.size());
  std::ranges::transform(candidates, weights.begin(), [&](const Candidate& c) {
    return probability(c, largest, spec.temperature);
  });
  if (spec.top_p < 1.0) {
    double total = 0.0;
    for (const double weight : weights) total += weight;
    double kept = 0.0;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      kept += weights[i];
      if (kept >= spec.top_p * total) weights.resize(i + 1);  // which ends the loop
    }
  }
  double total = 0.0;
  for (double& weight : weights) {
    if (weight < spec.min_p) weight = 0.0;
    total += weight;
  }
  double left = spec.uniform * total;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    left -= weights[i];
    if (left < 0.0) return candidates[i].id;
  }
  return candidates.front().id;
}

std::vector<Candidate> best_of(std::span<const float> logits, std::int64_t count) {
  std::vector<Candidate> best;
  const auto most = std::min(static_cast<std::size_t>(count), logits.size());
  if (most == 0) return best;
  best.reserve(most + 1);
  for (std::size_t id = 0; id < logits.size(); ++id) {
    const float logit = std::isnan(logits[id]) ? -kInfinity : logits[id];
    if (best.size() == most && !(logit > best.back().logit)) continue;
    const Candidate candidate{logit, static_cast<std::int32_t>(id)};
    best.insert(std::ranges::upper_bound(best, candidate, better), candidate);
    if (best.size() > most) best.pop_back();
  }
  return best;
}

}  // namespace dsfp4::engine
