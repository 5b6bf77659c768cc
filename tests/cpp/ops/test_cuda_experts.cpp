// Experts of the CUDA backend, routed, shared and as tasks, against `reference`.
#include <algorithm>
#include <numeric>
#include <ostream>
#include <span>
#include <vector>

#include <gtest/gtest.h>

#include "ops/cuda_backend.h"
#include "ops/cuda_fixture.h"
#include "ops/host_routing.h"

namespace dsfp4::ops {
namespace {

using format::WeightFormat;

struct ExpertsCase {
  WeightFormat gate, up, down;
  std::int64_t experts, top_k, hidden, intermediate, tokens;
};

std::ostream& operator<<(std::ostream& out, const ExpertsCase& c) {
  for (const WeightFormat format : {c.gate, c.up, c.down}) {
    out << format::weight_format_name(format) << " ";
  }
  return out << c.top_k << " of " << c.experts << ", " << c.hidden << " x " << c.intermediate
             << ", " << c.tokens << " tokens";
}

class CudaExperts : public Cuda, public ::testing::WithParamInterface<ExpertsCase> {
 protected:
  // Experts on the host and on the device, and the pairs that choose them: distinct within a token;
  // expert 1 is never chosen.
  void SetUp() override {
    Cuda::SetUp();
    if (backend_ == nullptr) return;
    matrices_.reserve(static_cast<std::size_t>(3 * c_.experts));
    for (std::int64_t e = 0; e < c_.experts; ++e) {
      const auto seed = static_cast<std::uint32_t>(100 + 3 * e);
      matrices_.push_back(random_weight(c_.gate, c_.intermediate, c_.hidden, seed));
      matrices_.push_back(random_weight(c_.up, c_.intermediate, c_.hidden, seed + 1));
      matrices_.push_back(random_weight(c_.down, c_.hidden, c_.intermediate, seed + 2));
      const auto* m = &matrices_[static_cast<std::size_t>(3 * e)];
      host_.push_back({m[0].view(), m[1].view(), m[2].view()});
      device_.push_back(uploaded(static_cast<std::size_t>(e)));
    }
    by_expert_.resize(host_.size());
    for (std::int64_t p = 0; p < pairs_; ++p) {
      std::int64_t e = (p / c_.top_k * 5 + p % c_.top_k) % c_.experts;
      if (c_.experts > c_.top_k && e == 1) e = (p / c_.top_k * 5 + c_.top_k) % c_.experts;
      used_.push_back(static_cast<std::int32_t>(e));
      by_expert_[static_cast<std::size_t>(e)].push_back(static_cast<std::int32_t>(p));
    }
  }

  // At another address with every call.
  ExpertView uploaded(std::size_t e) {
    const auto* m = &matrices_[3 * e];
    return {on_device(m[0]), on_device(m[1]), on_device(m[2])};
  }

  std::vector<ExpertTask> tasks_of(const std::vector<ExpertView>& views) const {
    std::vector<ExpertTask> tasks;
    for (std::size_t e = 0; e < views.size(); ++e) {
      if (!by_expert_[e].empty()) tasks.push_back({&views[e], by_expert_[e]});
    }
    return tasks;
  }

  const ExpertsCase c_ = GetParam();
  const std::int64_t pairs_ = c_.tokens * c_.top_k;
  std::vector<format::EncodedMatrix> matrices_;
  std::vector<ExpertView> host_, device_;
  std::vector<std::int32_t> used_;
  std::vector<std::vector<std::int32_t>> by_expert_;
  OwnedMatrix x_{c_.tokens, c_.hidden, 43};
};

TEST_P(CudaExperts, AgreeWithReference) {
  OwnedMatrix y(c_.tokens, c_.hidden, 44);  // what the shared experts gave
  const auto count = static_cast<std::size_t>(pairs_);
  const std::vector<float> weights = random_values(pairs_, 45);
  const Matrix dy = on_device(y);
  OwnedMatrix hidden(pairs_, c_.intermediate);
  OwnedMatrix routed(pairs_, c_.hidden);
  const Matrix dhidden = on_device(hidden);
  const Matrix drouted = on_device(routed);
  reference_->experts(tasks_of(host_), c_.top_k, x_.view(), hidden.view(), routed.view(),
                      Phase::kDecode);
  reference_->combine(routed.view(), weights, c_.top_k, y.view());

  const DevicePtr<std::int32_t> dused = on_device(used_.data(), count);
  std::vector<float> weights_copy = weights;
  const DevicePtr<float> dweights = on_device(weights_copy.data(), count);
  const Routing routing{{dused, count}, {dused, count}, {dweights, count}};
  ASSERT_TRUE(backend_->has_routed_experts());
  backend_->routed_experts(device_, routing, c_.top_k, on_device(x_), dhidden, drouted, dy,
                           nullptr);
  EXPECT_LT(relative_error(on_host(dy), y.values), kTolerance);

  // Expert 1 as the shared one: with the others, or alone before them.
  if (!backend_->takes_shared(device_, device_[1], c_.tokens, c_.top_k)) return;
  std::vector<std::int32_t> all(static_cast<std::size_t>(c_.tokens));
  std::iota(all.begin(), all.end(), 0);
  OwnedMatrix shared_hidden(c_.tokens, c_.intermediate);
  OwnedMatrix expected(c_.tokens, c_.hidden);
  const ExpertTask one[] = {{&host_[1], all}};
  reference_->experts(one, 1, x_.view(), shared_hidden.view(), expected.view(), Phase::kDecode);
  reference_->combine(routed.view(), weights, c_.top_k, expected.view());
  const OwnedMatrix more(pairs_ + c_.tokens, c_.intermediate);
  backend_->routed_experts(device_, routing, c_.top_k, on_device(x_), on_device(more), drouted, dy,
                           &device_[1]);
  EXPECT_LT(relative_error(on_host(dy), expected.values), kTolerance);
}

// In one call, and in one for each expert with other bytes in scratch: the same bits.
TEST_P(CudaExperts, AddedInOrderAgreeWithReference) {
  const std::int64_t held = added_pairs(c_.tokens, c_.top_k);
  const std::vector<float> weights = random_values(pairs_, 45);
  std::vector<float> weights_copy = weights;
  const DeviceSpan<const float> mixing{
      on_device(weights_copy.data(), static_cast<std::size_t>(pairs_)),
      static_cast<std::size_t>(pairs_)};
  OwnedMatrix hidden(held, c_.intermediate);
  OwnedMatrix out(held, c_.hidden);
  OwnedMatrix expected(c_.tokens, c_.hidden, 44);
  const Matrix at_once = on_device(expected);
  const Matrix one_by_one = on_device(expected);
  const Matrix x = on_device(x_);
  const Matrix dhidden = on_device(hidden);
  const Matrix dout = on_device(out);
  const std::vector<ExpertTask> tasks = tasks_of(device_);
  for (const ExpertTask& task : tasks_of(host_)) {
    reference_->add_experts({&task, 1}, weights, c_.top_k, x_.view(), hidden.view(), out.view(),
                            expected.view(), Phase::kPrefill);
  }
  for (std::size_t first = 0; first < tasks.size();) {  // as many as scratch holds
    std::size_t count = 0;
    std::int64_t rows = 0;
    while (first + count < tasks.size()) {
      rows += std::ssize(tasks[first + count].pairs);
      if (rows > held) break;
      ++count;
    }
    backend_->add_experts(std::span(tasks).subspan(first, count), mixing, c_.top_k, x, dhidden,
                          dout, at_once, Phase::kPrefill);
    first += count;
  }
  for (const ExpertTask& task : tasks) {
    backend_->add_experts({&task, 1}, mixing, c_.top_k, x, dhidden, dout, one_by_one,
                          Phase::kPrefill);
  }
  EXPECT_LT(relative_error(on_host(at_once), expected.values), kTolerance);
  EXPECT_EQ(on_host(at_once), on_host(one_by_one));
}

TEST_P(CudaExperts, OfTasksAgreeWithReference) {
  OwnedMatrix hidden(pairs_, c_.intermediate);
  OwnedMatrix expected(pairs_, c_.hidden);
  const OwnedMatrix poison(pairs_, c_.hidden);
  const Matrix x = on_device(x_);
  const Matrix dhidden = on_device(hidden);
  const Matrix out = on_device(poison);
  reference_->experts(tasks_of(host_), c_.top_k, x_.view(), hidden.view(), expected.view(),
                      Phase::kDecode);
  backend_->experts(tasks_of(device_), c_.top_k, x, dhidden, out, Phase::kDecode);
  const std::vector<float> at_once = on_host(out);
  EXPECT_LT(relative_error(at_once, expected.values), kTolerance);

  // In three calls, each with a part of every expert's pairs, from experts of its own. A row that
  // no call has named so far is as it was; one that a call has named has the same bits as before.
  const Matrix parts = on_device(poison);
  std::vector<bool> named(static_cast<std::size_t>(pairs_));
  for (std::size_t call = 0; call < 3; ++call) {
    std::vector<std::vector<std::int32_t>> some(host_.size());
    std::vector<ExpertView> views(host_.size());
    std::vector<ExpertTask> tasks;
    for (std::size_t e = host_.size(); e-- > 0;) {  // in another order
      for (std::size_t i = 0; i < by_expert_[e].size(); ++i) {
        if ((i + e) % 3 == call) some[e].push_back(by_expert_[e][i]);
      }
      if (some[e].empty()) continue;
      views[e] = uploaded(e);
      tasks.push_back({&views[e], some[e]});
      for (const std::int32_t p : some[e]) named[static_cast<std::size_t>(p)] = true;
    }
    backend_->experts(tasks, c_.top_k, x, dhidden, parts, Phase::kDecode);
    const std::vector<float> got = on_host(parts);
    for (std::size_t p = 0; p < named.size(); ++p) {
      const auto width = static_cast<std::ptrdiff_t>(c_.hidden);
      const auto at = static_cast<std::ptrdiff_t>(p) * width;
      const std::vector<float>& from = named[p] ? at_once : poison.values;
      ASSERT_TRUE(std::equal(got.begin() + at, got.begin() + at + width, from.begin() + at))
          << "pair " << p << (named[p] ? ", named" : ", not named") << ", call " << call;
    }
  }
}

constexpr auto kF3 = WeightFormat::kF32;
constexpr auto kNv = WeightFormat::kNvfp4;
constexpr auto kMx = WeightFormat::kMxfp4;
constexpr auto kF8 = WeightFormat::kFp8Block;
constexpr auto kBf = WeightFormat::kBF16;
INSTANTIATE_TEST_SUITE_P(
    All, CudaExperts,
    ::testing::Values(ExpertsCase{kNv, kF8, kNv, 4, 2, 96, 48, 3},     // mixed
                      ExpertsCase{kNv, kNv, kNv, 12, 3, 144, 80, 5},   // rows of no 16 bytes
                      ExpertsCase{kBf, kBf, kBf, 6, 2, 51, 27, 4},     // odd
                      ExpertsCase{kF3, kF3, kF3, 6, 2, 64, 32, 6},     // plain kernels only
                      ExpertsCase{kNv, kNv, kNv, 16, 8, 512, 256, 1},  // one token
                      ExpertsCase{kMx, kMx, kMx, 16, 6, 512, 256, 1},
                      ExpertsCase{kF8, kF8, kF8, 16, 8, 512, 256, 1},
                      ExpertsCase{kBf, kBf, kBf, 16, 8, 512, 256, 1},
                      ExpertsCase{kNv, kNv, kNv, 16, 8, 640, 384, 1},  // odd chunks of 128 columns
                      ExpertsCase{kMx, kMx, kMx, 16, 8, 640, 384, 2},
                      ExpertsCase{kNv, kNv, kNv, 16, 8, 384, 128, 7},   // a few
                      ExpertsCase{kNv, kNv, kNv, 16, 8, 512, 256, 70},  // many
                      ExpertsCase{kMx, kMx, kMx, 16, 6, 512, 256, 70},
                      // Scales of a row in whole units of 16 bytes, gate and up, and not, down.
                      ExpertsCase{kNv, kNv, kNv, 16, 8, 1280, 640, 70},
                      ExpertsCase{kMx, kMx, kMx, 16, 8, 1536, 640, 70},
                      ExpertsCase{kF8, kF8, kF8, 16, 4, 384, 128, 70},
                      ExpertsCase{kBf, kBf, kBf, 16, 4, 384, 128, 70},
                      // 14 to 18 an expert: products of 16 tokens, and of 32.
                      ExpertsCase{kNv, kNv, kNv, 16, 8, 512, 256, 30},
                      ExpertsCase{kMx, kMx, kMx, 16, 8, 512, 256, 30},
                      ExpertsCase{kF8, kF8, kF8, 16, 8, 384, 256, 30},
                      ExpertsCase{kBf, kBf, kBf, 16, 8, 160, 96, 30},
                      // 54 to 69 an expert: products of 64 tokens, and of 128.
                      ExpertsCase{kNv, kNv, kNv, 8, 4, 512, 256, 110},
                      ExpertsCase{kMx, kMx, kMx, 8, 4, 512, 256, 110},
                      ExpertsCase{kF8, kF8, kF8, 8, 4, 384, 256, 110},
                      ExpertsCase{kBf, kBf, kBf, 8, 4, 160, 96, 110},
                      // 300: two times 144, and 12.
                      ExpertsCase{kNv, kNv, kNv, 3, 2, 512, 256, 300},
                      ExpertsCase{kMx, kMx, kMx, 3, 2, 512, 256, 300},
                      ExpertsCase{kF8, kF8, kF8, 3, 2, 384, 256, 300},
                      ExpertsCase{kBf, kBf, kBf, 3, 2, 160, 96, 300}));

class CudaTasks : public Cuda {
 protected:
  void SetUp() override {
    Cuda::SetUp();
    if (backend_ == nullptr) return;
    expert_ = {on_device(gate_), on_device(up_), on_device(down_)};
  }

  const format::EncodedMatrix gate_ = random_weight(kNv, 256, 512, 1);
  const format::EncodedMatrix up_ = random_weight(kNv, 256, 512, 2);
  const format::EncodedMatrix down_ = random_weight(kNv, 512, 256, 3);
  ExpertView expert_;
};

// One expert of another format sends all through the plain kernels, which read each as it is.
TEST_F(CudaTasks, OfSeveralFormats) {
  const auto gate = random_weight(kBf, 256, 512, 4);
  const ExpertView host[] = {{gate_.view(), up_.view(), down_.view()},
                             {gate.view(), up_.view(), down_.view()}};
  const ExpertView device[] = {expert_, {on_device(gate), expert_.up_proj, expert_.down_proj}};
  for (const std::int64_t tokens : {2, 20}) {
    OwnedMatrix x(tokens, 512, 5);
    OwnedMatrix hidden(2 * tokens, 256);
    OwnedMatrix expected(2 * tokens, 512);
    const OwnedMatrix poison(2 * tokens, 512);
    const Matrix out = on_device(poison);
    std::vector<std::int32_t> even, odd;
    for (std::int32_t p = 0; p < 2 * tokens; p += 2) {
      even.push_back(p);
      odd.push_back(p + 1);
    }
    const std::vector<ExpertTask> on_the_host = {{&host[0], even}, {&host[1], odd}};
    const std::vector<ExpertTask> tasks = {{&device[0], even}, {&device[1], odd}};
    reference_->experts(on_the_host, 2, x.view(), hidden.view(), expected.view(), Phase::kDecode);
    backend_->experts(tasks, 2, on_device(x), on_device(hidden), out, Phase::kDecode);
    EXPECT_LT(relative_error(on_host(out), expected.values), kTolerance);
  }
}

TEST_F(CudaTasks, ThatDoNotFitTheStepAreRefused) {
  const OwnedMatrix poison(4, 512);
  const OwnedMatrix hidden(4, 256);
  const Matrix x = on_device(OwnedMatrix(2, 512, 5));
  const Matrix dhidden = on_device(hidden);
  const Matrix out = on_device(poison);
  const std::vector<std::int32_t> good = {0, 1, 2};
  const std::vector<std::int32_t> beyond = {0, 4};
  const std::vector<std::int32_t> negative = {-1};
  const ExpertView turned{expert_.down_proj, expert_.up_proj, expert_.gate_proj};
  const auto expect_refused = [&](const std::vector<ExpertTask>& tasks) {
    EXPECT_THROW(backend_->experts(tasks, 2, x, dhidden, out, Phase::kDecode), CudaError);
    EXPECT_EQ(on_host(out), poison.values);
  };
  expect_refused({{&expert_, good}, {&expert_, beyond}});
  expect_refused({{&expert_, negative}});
  expect_refused({{&expert_, good}, {&expert_, good}});  // more pairs than there are
  expect_refused({{&expert_, good}, {&turned, good}});
  const std::vector<std::int32_t> none;
  backend_->experts(std::vector<ExpertTask>{}, 2, x, dhidden, out, Phase::kDecode);
  backend_->experts(std::vector<ExpertTask>{{&expert_, none}}, 2, x, dhidden, out, Phase::kDecode);
  EXPECT_EQ(on_host(out), poison.values);
}

TEST_F(CudaTasks, TakeNoMemoryOnceItIsReserved) {
  CudaBackend limited(cuda_plugin(), 0, 4'000'000'000);
  const std::vector<ExpertView> layer(8, expert_);
  Ops::Largest largest;
  largest.mla = {16, 512, 128, 64, 128, 0.1f};
  largest.rows = largest.dense_rows = 64;
  largest.context = 256;
  largest.width = largest.step_width = 512;
  largest.vocab = 1000;
  largest.top_k = 8;
  largest.experts = layer;
  limited.reserve(largest);
  const auto wait_for_uploads = [&] { backend_->device().synchronize(); };
  const std::size_t before = limited.device().memory().available();
  for (const std::int64_t tokens : {std::int64_t{1}, kMostHostRows}) {
    const std::int64_t pairs = tokens * 8;
    const Matrix x = on_device(OwnedMatrix(tokens, 512, 5));
    const Matrix hidden = on_device(OwnedMatrix(pairs, 256));
    const Matrix out = on_device(OwnedMatrix(pairs, 512));
    std::vector<std::vector<std::int32_t>> by_slot(8);
    for (std::int64_t p = 0; p < pairs; ++p) {
      by_slot[static_cast<std::size_t>(p % 8)].push_back(static_cast<std::int32_t>(p));
    }
    std::vector<ExpertTask> tasks;
    tasks.reserve(layer.size());
    for (std::size_t e = 0; e < layer.size(); ++e) tasks.push_back({&layer[e], by_slot[e]});
    wait_for_uploads();  // they are in the queue of another backend
    for (int i = 0; i < 3; ++i) limited.experts(tasks, 8, x, hidden, out, Phase::kDecode);
    limited.device().synchronize();
  }
  EXPECT_EQ(limited.device().memory().available(), before);
}

// The pinned ring, through which lists and uploads pass, goes round several times.
TEST_F(CudaTasks, ManyCallsBetweenUploads) {
  constexpr std::int64_t kPairs = 64;
  const Matrix x = on_device(OwnedMatrix(kPairs, 512, 5));
  const Matrix hidden = on_device(OwnedMatrix(kPairs, 256));
  const OwnedMatrix poison(kPairs, 512);
  const Matrix out = on_device(poison);
  const Matrix at_once = on_device(poison);
  std::vector<std::int32_t> all(kPairs);
  std::iota(all.begin(), all.end(), 0);
  backend_->experts(std::vector<ExpertTask>{{&expert_, all}}, 1, x, hidden, at_once,
                    Phase::kDecode);
  const std::vector<char> others(300'001, 'x');
  const DevicePtr<char> to = on_device(others.data(), others.size());
  for (std::size_t p = 0; p < all.size(); ++p) {
    const std::vector<ExpertTask> one = {{&expert_, std::span(all).subspan(p, 1)}};
    backend_->experts(one, 1, x, hidden, out, Phase::kDecode);
    backend_->device().upload(others.data(), to, others.size());
  }
  EXPECT_EQ(on_host(out), on_host(at_once));
}

}  // namespace
}  // namespace dsfp4::ops
