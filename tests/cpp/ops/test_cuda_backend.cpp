// The CUDA backend's operations but attention and experts, against `reference`.
#include <cmath>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "engine/sampler.h"
#include "ops/cuda_fixture.h"
#include "ops/scratch.h"

namespace dsfp4::ops {
namespace {

using format::WeightFormat;
using testing::kAllFormats;

class CudaLinear : public Cuda {
 protected:
  void expect_linear(WeightFormat format, std::int64_t rows, std::int64_t cols, std::int64_t tokens,
                     Inputs inputs, double tolerance) {
    const ScratchScope scope(*arena_);
    const auto weight =
        random_weight(format, rows, cols, static_cast<std::uint32_t>(rows + tokens));
    OwnedMatrix x(tokens, cols, static_cast<std::uint32_t>(cols));
    OwnedMatrix expected(tokens, rows);
    const OwnedMatrix poison(tokens, rows);
    reference_->linear(weight.view(), x.view(), expected.view(), Phase::kDecode);
    const Matrix y = on_device(poison);
    backend_->linear(on_device(weight), on_device(x), y, Phase::kDecode, inputs);
    const std::vector<float> actual = on_host(y);
    EXPECT_LT(relative_error(actual, expected.values), tolerance)
        << format::weight_format_name(format) << " " << rows << "x" << cols << ", " << tokens
        << " tokens";
  }
};

TEST_F(CudaLinear, OfOddShapes) {
  for (const WeightFormat format : kAllFormats) {
    for (const auto& [rows, cols] :
         {std::pair<std::int64_t, std::int64_t>{21, 32}, {130, 352}, {33, 96}}) {
      for (const std::int64_t tokens : {1, 3, 9}) {
        expect_linear(format, rows, cols, tokens, Inputs::kBf16, kTolerance);
        expect_linear(format, rows, cols, tokens, Inputs::kF32, 1e-5);
      }
    }
  }
  expect_linear(WeightFormat::kBF16, 37, 51, 5, Inputs::kBf16, kTolerance);
  expect_linear(WeightFormat::kFp8Block, 131, 150, 5, Inputs::kBf16, kTolerance);
  expect_linear(WeightFormat::kNvfp4, 20, 144, 2, Inputs::kBf16, kTolerance);
}

TEST_F(CudaLinear, OfEveryNumberOfTokens) {
  for (const WeightFormat format : kAllFormats) {
    for (const std::int64_t tokens : {1, 2, 4, 7, 8, 9, 16, 17, 31, 64, 65, 130}) {
      expect_linear(format, 272, 384, tokens, Inputs::kBf16, kTolerance);
    }
    expect_linear(format, 144, 1312, 1, Inputs::kBf16, kTolerance);
    expect_linear(format, 144, 1312, 40, Inputs::kBf16, kTolerance);
    expect_linear(format, 256, 2048, 1, Inputs::kF32, 1e-5);
  }
}

TEST_F(Cuda, LinearPairIsTwoProducts) {
  const ScratchScope scope(*arena_);
  for (const WeightFormat format : kAllFormats) {
    for (const std::int64_t tokens : {1, 3, 8, 20}) {
      OwnedMatrix x(tokens, 640, 4);
      const Matrix dx = on_device(x);
      const WeightFormat other = tokens == 3 ? WeightFormat::kBF16 : format;
      const format::EncodedMatrix weights[] = {random_weight(format, 100, 640, 1),
                                               random_weight(other, 36, 640, 2)};
      OwnedMatrix y[] = {OwnedMatrix(tokens, 100), OwnedMatrix(tokens, 36)};
      const Matrix dy[] = {on_device(y[0]), on_device(y[1])};
      for (int i = 0; i < 2; ++i) {
        reference_->linear(weights[i].view(), x.view(), y[i].view(), Phase::kDecode);
      }
      backend_->linear_pair(on_device(weights[0]), dy[0], on_device(weights[1]), dy[1], dx,
                            Phase::kDecode);
      for (int i = 0; i < 2; ++i) {
        EXPECT_LT(relative_error(on_host(dy[i]), y[i].values), kTolerance);
      }
    }
  }
}

// So many that blocks take 256 rows and 128 tokens where a GPU has room for that.
TEST_F(CudaLinear, OfManyTokensAndRows) {
  for (const WeightFormat format : kAllFormats) {
    expect_linear(format, 8516, 256, 500, Inputs::kBf16, kTolerance);
  }
}

TEST_F(Cuda, ElementwiseOps) {
  for (const auto& [rows, cols] :
       {std::pair<std::int64_t, std::int64_t>{1, 7}, {5, 300}, {2, 7168}, {3, 8196}}) {
    const ScratchScope scope(*arena_);
    OwnedMatrix x(rows, cols, 1);
    OwnedMatrix y(rows, cols, 2);
    const std::vector<float> weight = random_values(cols, 3);
    const Matrix dx = on_device(x);
    const Matrix dy = on_device(y);
    const DevicePtr<const float> dw = on_device(weight.data(), weight.size());
    const auto count = static_cast<std::size_t>(cols);
    reference_->rms_norm(x.view(), weight, 1e-6f, x.view());
    backend_->rms_norm(dx, {dw, count}, 1e-6f, dx);
    EXPECT_LT(relative_error(on_host(dx), x.values), 1e-5);
    reference_->silu_mul(y.view(), x.view());
    backend_->silu_mul(dy, dx);
    EXPECT_LT(relative_error(on_host(dy), y.values), 1e-5);
    reference_->add(x.view(), y.view());
    backend_->add(dx, dy);
    EXPECT_LT(relative_error(on_host(dy), y.values), 1e-5);
    backend_->zero(dy);
    EXPECT_EQ(on_host(dy), std::vector<float>(y.values.size(), 0.0f));
  }
}

TEST_F(Cuda, RopeAndEmbed) {
  OwnedMatrix x(3, 4 * 24, 5);
  OwnedMatrix angles(3, 20, 6);
  const Matrix dx = on_device(x);
  reference_->rope(x.view().columns(4, 92), 4, 24, angles.view());
  backend_->rope(dx.columns(4, 92), 4, 24, on_device(angles));
  EXPECT_LT(relative_error(on_host(dx), x.values), 1e-6);

  const std::vector<std::int32_t> ids = {3, 0, 16, 3};
  for (const WeightFormat format : {WeightFormat::kF32, WeightFormat::kBF16}) {
    const auto table = random_weight(format, 17, 33, 7);
    OwnedMatrix expected(4, 33);
    const OwnedMatrix poison(4, 33);
    const Matrix out = on_device(poison);
    reference_->embed(table.view(), ids, expected.view());
    backend_->embed(on_device(table), ids, out);
    EXPECT_EQ(on_host(out), expected.values);
    EXPECT_THROW(backend_->embed(on_device(table), std::vector<std::int32_t>{17}, out),
                 ParameterError);
  }
}

TEST_F(Cuda, RouterChoosesAsTheHost) {
  for (const auto scoring : {RouterSpec::Scoring::kSoftmax, RouterSpec::Scoring::kSigmoid}) {
    for (const auto& [experts, groups, kept] :
         {std::tuple<std::int64_t, std::int64_t, std::int64_t>{256, 8, 4},
          {64, 1, 1},
          {12, 3, 2}}) {
      const ScratchScope scope(*arena_);
      RouterSpec spec;
      spec.experts = experts;
      spec.top_k = experts == 12 ? 3 : 8;
      spec.groups = groups;
      spec.kept_groups = kept;
      spec.scoring = scoring;
      spec.group_score = scoring == RouterSpec::Scoring::kSigmoid
                             ? RouterSpec::GroupScore::kSumOfTop2
                             : RouterSpec::GroupScore::kMax;
      spec.normalize = scoring == RouterSpec::Scoring::kSigmoid;
      spec.scaling_factor = 2.5f;
      OwnedMatrix logits(37, experts, 11);
      for (std::size_t i = 0; i < logits.values.size(); i += 5) logits.values[i] = 0.25f;  // ties
      const std::vector<float> bias = random_values(experts, 12);
      const auto pairs = static_cast<std::size_t>(37 * spec.top_k);
      std::vector<std::int32_t> own(pairs), used(pairs), forced(pairs);
      std::vector<float> weights(pairs);
      for (std::size_t i = 0; i < pairs; ++i) {
        forced[i] = static_cast<std::int32_t>((i * 7) % static_cast<std::size_t>(experts));
      }
      for (const bool force : {false, true}) {
        const std::vector<std::int32_t> given = force ? forced : std::vector<std::int32_t>{};
        reference_->route(spec, logits.view(), bias, given, {own, used, weights});
        const std::vector<std::int32_t> poison(2 * pairs, -1);
        const std::vector<float> poison_weights(pairs, -777.0f);
        const DevicePtr<std::int32_t> ints = on_device(poison.data(), poison.size());
        const DevicePtr<float> out = on_device(poison_weights.data(), pairs);
        const DevicePtr<const float> on_gpu_bias = on_device(bias.data(), bias.size());
        backend_->route(
            spec, on_device(logits), {on_gpu_bias, bias.size()}, given,
            {{ints, pairs}, {ints + static_cast<std::ptrdiff_t>(pairs), pairs}, {out, pairs}});
        std::vector<std::int32_t> got(2 * pairs);
        std::vector<float> got_weights(pairs);
        backend_->device().download(ints, got.data(), got.size() * sizeof(std::int32_t));
        backend_->device().download(out, got_weights.data(), pairs * sizeof(float));
        EXPECT_TRUE(std::equal(own.begin(), own.end(), got.begin()));
        EXPECT_TRUE(
            std::equal(used.begin(), used.end(), got.begin() + static_cast<std::ptrdiff_t>(pairs)));
        EXPECT_LT(relative_error(got_weights, weights), 1e-6);
      }
    }
  }
}

// The same draws as the host's sampler, with the same numbers.
TEST_F(Cuda, SamplesAsTheHost) {
  constexpr std::int64_t kVocab = 5003;
  OwnedMatrix logits(1, kVocab, 77);
  for (float& v : logits.values) v *= 4.0f;
  for (std::size_t i = 0; i < 40; ++i) logits.values[100 + 3 * i] = 7.5f;  // ties, near the top
  logits.values[5] = std::numeric_limits<float>::quiet_NaN();
  logits.values[6] = -std::numeric_limits<float>::infinity();
  const Matrix on_gpu = on_device(logits);
  for (const auto& [temperature, top_k, top_p, min_p] :
       {std::tuple<double, std::int64_t, double, double>{0.0, 0, 1.0, 0.0},
        {1.0, 0, 1.0, 0.0},
        {0.7, 50, 1.0, 0.0},
        {1.3, 0, 0.9, 0.0},
        {1.0, 45, 0.5, 0.05},
        {5.0, 0, 0.999, 0.2}}) {
    GenerateOptions options;
    options.temperature = temperature;
    options.top_k = top_k;
    options.top_p = top_p;
    options.min_p = min_p;
    options.seed = 9;
    engine::Sampler host(options, {}, kVocab);
    engine::Sampler draws(options, {}, kVocab);
    int same = 0;
    for (int i = 0; i < 100; ++i) {
      const std::int32_t expected = host.sample(logits.values);
      same += backend_->sample(on_gpu, *draws.draw()) == expected ? 1 : 0;
    }
    EXPECT_GE(same, 99) << temperature << " " << top_k << " " << top_p << " " << min_p;
  }
}

TEST_F(Cuda, MemoryLimitHolds) {
  EXPECT_THROW(make_cuda_ops(0, 1000), MemoryLimitError);
  const auto limited = make_cuda_ops(0, 3'000'000'000);
  try {
    const memory::Arena arena(std::size_t{3} << 30, "a test", limited->device().memory());
    FAIL() << "3.2 GB within 3 GB";
  } catch (const MemoryLimitError& error) {
    EXPECT_EQ(error.needed(), std::size_t{3} << 30);
    EXPECT_LT(error.available(), 3'000'000'000u);
    EXPECT_NE(std::string(error.what()).find("VRAM"), std::string::npos);
  }
  try {
    const memory::Arena arena(std::size_t{1} << 42, "a test", backend_->device().memory());
    FAIL() << "4 TB";
  } catch (const MemoryLimitError& error) {
    EXPECT_GT(error.available(), 0u);
  }
}

}  // namespace
}  // namespace dsfp4::ops
