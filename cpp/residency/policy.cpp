#include "residency/policy.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <utility>

#include "dsfp4/error.h"

namespace dsfp4::residency {
namespace {

using Scores = std::span<const float>;
using Experts = std::span<const std::int32_t>;

// A number for each expert that fades by a factor with each token of its layer.
class Fading {
 public:
  Fading(std::int64_t layers, std::int64_t experts, float factor)
      : experts_(static_cast<std::size_t>(experts)),
        factor_(factor),
        values_(static_cast<std::size_t>(layers) * experts_, 0.0f) {}

  std::span<float> fade(std::int64_t layer) {
    const std::span<float> row =
        std::span(values_).subspan(static_cast<std::size_t>(layer) * experts_, experts_);
    for (float& value : row) value *= factor_;
    return row;
  }
  void count(std::int64_t layer, Experts used) {
    const std::span<float> row = fade(layer);
    for (const std::int32_t e : used) row[static_cast<std::size_t>(e)] += 1.0f - factor_;
  }
  void average(std::int64_t layer, Scores scores) {
    const std::span<float> row = fade(layer);
    for (std::size_t e = 0; e < scores.size(); ++e) row[e] += (1.0f - factor_) * scores[e];
  }
  float operator[](ExpertKey key) const { return values_[key]; }
  std::vector<float>& values() { return values_; }
  const std::vector<float>& values() const { return values_; }

 private:
  std::size_t experts_;
  float factor_;
  std::vector<float> values_;
};

// The numbers of a policy are those of its Fadings, one after the other.
class FadingPolicy : public Policy {
 public:
  FadingPolicy(std::string_view name, std::int64_t layers, std::int64_t experts,
               std::initializer_list<float> factors)
      : name_(name) {
    for (const float factor : factors) parts_.emplace_back(layers, experts, factor);
  }
  std::string_view name() const noexcept override { return name_; }
  std::vector<float> state() const override {
    std::vector<float> all;
    for (const Fading& part : parts_) {
      all.insert(all.end(), part.values().begin(), part.values().end());
    }
    return all;
  }
  bool restore(std::span<const float> state) override {
    std::size_t size = 0;
    for (const Fading& part : parts_) size += part.values().size();
    if (state.size() != size || !std::ranges::all_of(state, [](float v) { return v >= 0.0f; })) {
      return false;
    }
    for (Fading& part : parts_) {
      std::copy_n(state.begin(), part.values().size(), part.values().begin());
      state = state.subspan(part.values().size());
    }
    return true;
  }

 protected:
  std::vector<Fading> parts_;

 private:
  std::string_view name_;
};

// Recency only. A time is kept as an exact small integer of float, per layer in tokens; a million
// tokens of history are told apart, and earlier ones are all old.
class Lru final : public Policy {
 public:
  Lru(std::int64_t layers, std::int64_t experts)
      : experts_(static_cast<std::size_t>(experts)),
        times_(static_cast<std::size_t>(layers)),
        last_(static_cast<std::size_t>(layers) * experts_, -kLongest) {}
  std::string_view name() const noexcept override { return "lru"; }
  void use(std::int64_t layer, Experts used, Scores) override {
    float& now = times_[static_cast<std::size_t>(layer)];
    if (now >= kLongest) rebase(layer);
    now += 1.0f;
    for (const std::int32_t e : used) {
      last_[static_cast<std::size_t>(layer) * experts_ + static_cast<std::size_t>(e)] = now;
    }
  }
  // Layers see the same number of tokens, but for the step that is running.
  float value(ExpertKey key) const override {
    return std::max(last_[key] - times_[key / experts_], -kLongest);
  }
  std::vector<float> state() const override {
    std::vector<float> ages(last_.size());
    for (std::size_t key = 0; key < ages.size(); ++key) {
      ages[key] = value(static_cast<ExpertKey>(key));
    }
    return ages;
  }
  bool restore(std::span<const float> state) override {
    if (state.size() != last_.size() ||
        !std::ranges::all_of(state, [](float v) { return v <= 0.0f && v >= -kLongest; })) {
      return false;
    }
    std::ranges::fill(times_, 0.0f);
    std::ranges::copy(state, last_.begin());
    return true;
  }

 private:
  static constexpr float kLongest = 1 << 22;

  void rebase(std::int64_t layer) {
    float& now = times_[static_cast<std::size_t>(layer)];
    const std::size_t first = static_cast<std::size_t>(layer) * experts_;
    for (std::size_t e = 0; e < experts_; ++e) {
      last_[first + e] = std::max(last_[first + e] - now, -kLongest);
    }
    now = 0.0f;
  }

  std::size_t experts_;
  std::vector<float> times_;
  std::vector<float> last_;
};

class Lfu final : public FadingPolicy {
 public:
  Lfu(std::int64_t layers, std::int64_t experts) : FadingPolicy("lfu", layers, experts, {0.98f}) {}
  void use(std::int64_t layer, Experts used, Scores) override { parts_[0].count(layer, used); }
  float value(ExpertKey key) const override { return parts_[0][key]; }
};

// A recency-frequency mix: short-term rate plus long-term rate.
class Lrfu final : public FadingPolicy {
 public:
  Lrfu(std::int64_t layers, std::int64_t experts)
      : FadingPolicy("lrfu", layers, experts, {0.9f, 0.995f}) {}
  void use(std::int64_t layer, Experts used, Scores) override {
    for (Fading& part : parts_) part.count(layer, used);
  }
  float value(ExpertKey key) const override { return 0.5f * parts_[0][key] + parts_[1][key]; }
};

// Selection scores as a softmax over the experts; the temperature sets how near a miss counts.
std::vector<float> shares(Scores scores, float temperature) {
  std::vector<float> share(scores.begin(), scores.end());
  if (share.empty()) return share;
  const float largest = *std::ranges::max_element(share);
  float sum = 0.0f;
  for (float& s : share) sum += s = std::exp((s - largest) / temperature);
  for (float& s : share) s /= sum;
  return share;
}

class Router final : public FadingPolicy {
 public:
  Router(std::int64_t layers, std::int64_t experts)
      : FadingPolicy("router", layers, experts, {0.95f}) {}
  void use(std::int64_t layer, Experts, Scores scores) override {
    parts_[0].average(layer, shares(scores, 0.1f));
  }
  float value(ExpertKey key) const override { return parts_[0][key]; }
};

// Solves the small system a w = b by elimination with pivots; false if singular.
template <std::size_t N>
bool solve(std::array<std::array<double, N>, N> a, std::array<double, N> b,
           std::array<double, N>& w) {
  for (std::size_t i = 0; i < N; ++i) {
    std::size_t pivot = i;
    for (std::size_t r = i + 1; r < N; ++r) {
      if (std::abs(a[r][i]) > std::abs(a[pivot][i])) pivot = r;
    }
    if (!(std::abs(a[pivot][i]) > 1e-12)) return false;
    std::swap(a[i], a[pivot]);
    std::swap(b[i], b[pivot]);
    for (std::size_t r = i + 1; r < N; ++r) {
      const double f = a[r][i] / a[i][i];
      for (std::size_t c = i; c < N; ++c) a[r][c] -= f * a[i][c];
      b[r] -= f * b[i];
    }
  }
  for (std::size_t i = N; i-- > 0;) {
    w[i] = b[i];
    for (std::size_t c = i + 1; c < N; ++c) w[i] -= a[i][c] * w[c];
    w[i] /= a[i][i];
  }
  return true;
}

// Learns how much each horizon of use, and of the router's opinion, says about future use. The
// value of an expert is w . x, an estimate of its uses to come, each token counting kFuture as much
// as the one before; x are uses and score shares faded at several rates. The weights are those of
// least-squares temporal difference learning (Bradtke and Barto 1996), over all experts and layers:
// the sums A = sum x (x - kFuture x')^T and b = sum x u', where x' and u' are the next token's, are
// solved every kSolveEvery tokens. They begin as if a prior run had found kPrior.
//
// A place in RAM has a price, too: an expert of the layer that comes next holds it for a short
// while until it may be used, one of the layer that has just passed for a whole token. So w . x is
// less the price of that wait, which is kPrice mean uses for a token.
class Default final : public FadingPolicy {
 public:
  Default(std::int64_t layers, std::int64_t experts)
      : FadingPolicy("default", layers, experts, {0.9f, 0.97f, 0.985f, 0.995f, 0.9f, 0.985f}),
        layers_(static_cast<std::size_t>(layers)),
        experts_(static_cast<std::size_t>(experts)),
        used_(experts_) {
    begin_with(kPrior);
  }

  // The weights come after the faded numbers.
  std::vector<float> state() const override {
    std::vector<float> all = FadingPolicy::state();
    all.insert(all.end(), weights_.begin(), weights_.end());
    return all;
  }
  bool restore(std::span<const float> state) override {
    if (state.size() < kFeatures) return false;
    const std::span<const float> learnt = state.last(kFeatures);
    if (!std::ranges::all_of(learnt, [](float w) { return std::isfinite(w); }) ||
        !FadingPolicy::restore(state.first(state.size() - kFeatures))) {
      return false;
    }
    std::array<double, kFeatures> weights{};
    std::ranges::copy(learnt, weights.begin());
    a_ = {};
    begin_with(weights);
    return true;
  }

  void use(std::int64_t layer, Experts used, Scores scores) override {
    std::ranges::fill(used_, 0.0f);
    for (const std::int32_t e : used) used_[static_cast<std::size_t>(e)] = 1.0f;
    const std::vector<float> share = shares(scores, kTemperature);
    const std::size_t first = static_cast<std::size_t>(layer) * experts_;
    std::vector<Features> before(experts_);
    for (std::size_t e = 0; e < experts_; ++e) before[e] = features(first + e);
    for (std::size_t i = 0; i < kCounts; ++i) parts_[i].count(layer, used);
    for (std::size_t i = kCounts; i < kFeatures; ++i) parts_[i].average(layer, share);
    for (std::size_t e = 0; e < experts_; ++e) {
      const Features after = features(first + e);
      for (std::size_t i = 0; i < kFeatures; ++i) {
        const float x = before[e][i];
        for (std::size_t j = 0; j < kFeatures; ++j) {
          a_[i][j] += static_cast<double>(x * (before[e][j] - kFuture * after[j]));
        }
        b_[i] += static_cast<double>(x * used_[e]);
      }
    }
    passed_ = static_cast<std::size_t>(layer);
    price_ =
        kPrice / (1.0f - kFuture) * static_cast<float>(used.size()) / static_cast<float>(experts_);
    if (layer == 0 && ++tokens_ % kSolveEvery == 0) learn();
  }

  float value(ExpertKey key) const override {
    float value = 0.0f;
    for (std::size_t i = 0; i < kFeatures; ++i) value += weights_[i] * parts_[i][key];
    const std::size_t layers_to_wait = (key / experts_ + layers_ - passed_ - 1) % layers_ + 1;
    return value - price_ * static_cast<float>(layers_to_wait) / static_cast<float>(layers_);
  }

 private:
  static constexpr std::size_t kCounts = 4;
  static constexpr std::size_t kFeatures = 6;
  static constexpr float kFuture = 0.9f;
  static constexpr float kPrice = 0.4f;
  static constexpr float kTemperature = 0.3f;
  static constexpr int kSolveEvery = 32;
  static constexpr double kForget = 0.99;  // at each solution
  static constexpr double kPriorStrength = 5;
  static constexpr std::array<double, kFeatures> kPrior{0.1, 0.0, 3.0, 6.0, 0.0, 0.0};
  using Features = std::array<float, kFeatures>;

  Features features(std::size_t key) const {
    Features x;
    for (std::size_t i = 0; i < kFeatures; ++i) x[i] = parts_[i][static_cast<ExpertKey>(key)];
    return x;
  }

  // As if an earlier run had found these weights.
  void begin_with(const std::array<double, kFeatures>& weights) {
    for (std::size_t i = 0; i < kFeatures; ++i) {
      a_[i][i] = kPriorStrength;
      b_[i] = kPriorStrength * weights[i];
      weights_[i] = static_cast<float>(weights[i]);
    }
  }

  void learn() {
    std::array<double, kFeatures> w{};
    if (solve(a_, b_, w)) std::ranges::copy(w, weights_.begin());
    for (auto& row : a_) {
      for (double& value : row) value *= kForget;
    }
    for (double& value : b_) value *= kForget;
  }

  std::size_t layers_;
  std::size_t experts_;
  std::vector<float> used_;
  std::size_t passed_ = 0;  // the layer of the last use
  float price_ = 0.0f;      // of a place, for a token
  std::array<std::array<double, kFeatures>, kFeatures> a_{};
  std::array<double, kFeatures> b_{};
  std::array<float, kFeatures> weights_{};
  std::uint64_t tokens_ = 0;
};

constexpr std::array<std::string_view, 5> kNames{"lru", "lfu", "lrfu", "router", "default"};

}  // namespace

std::unique_ptr<Policy> make_policy(std::string_view name, std::int64_t layers,
                                    std::int64_t experts) {
  if (name == "lru") return std::make_unique<Lru>(layers, experts);
  if (name == "lfu") return std::make_unique<Lfu>(layers, experts);
  if (name == "lrfu") return std::make_unique<Lrfu>(layers, experts);
  if (name == "default") return std::make_unique<Default>(layers, experts);
  if (name == "router") return std::make_unique<Router>(layers, experts);
  throw ParameterError("policy",
                       "'" + std::string(name) + "' is not one of lru, lfu, lrfu, router, default");
}

void selection_scores(ops::RouterSpec::Scoring scoring, Scores logits, Scores bias,
                      std::span<float> scores) {
  if (scoring == ops::RouterSpec::Scoring::kSoftmax) {
    std::ranges::copy(shares(logits, 1.0f), scores.begin());
  } else {
    std::ranges::transform(logits, scores.begin(), [](float x) { return 1 / (1 + std::exp(-x)); });
  }
  for (std::size_t e = 0; e < bias.size(); ++e) scores[e] += bias[e];
}

std::span<const std::string_view> policy_names() { return kNames; }

}  // namespace dsfp4::residency
