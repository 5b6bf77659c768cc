// The CUDA backend against `reference`. Without a GPU these tests are skipped, unless
// DSFP4_REQUIRE_CUDA is set. Outputs are poisoned with OwnedMatrix's initial value.
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "engine/kv_cache.h"
#include "engine/sampler.h"
#include "format/scalar.h"
#include "memory/arena.h"
#include "ops/backend.h"
#include "ops/cuda_plugin.h"
#include "ops/random_weight.h"
#include "ops/scratch.h"

namespace dsfp4::ops {
namespace {

using format::WeightFormat;
using testing::kAllFormats;
using testing::OwnedMatrix;
using testing::random_values;
using testing::random_weight;
using testing::relative_error;

constexpr double kTolerance = 5e-3;  // BF16 inputs

class Cuda : public ::testing::Test {
 protected:
  void SetUp() override {
    try {
      cuda_device(0);
    } catch (const CudaError& error) {
      if (std::getenv("DSFP4_REQUIRE_CUDA") != nullptr) FAIL() << error.what();
      GTEST_SKIP() << error.what();
    }
    backend_ = make_cuda_backend(0, 0);
    reference_ = make_reference_backend(2);
    arena_ =
        std::make_unique<memory::Arena>(std::size_t{512} << 20, "the tests", backend_->memory());
  }

  template <typename T>
  T* on_device(const T* values, std::size_t count) {
    T* to = arena_->take_array<T>(count);
    backend_->upload(values, to, count * sizeof(T));
    return to;
  }
  Matrix on_device(const OwnedMatrix& matrix) {
    return {on_device(matrix.values.data(), matrix.values.size()), matrix.rows_, matrix.cols_,
            matrix.cols_};
  }
  format::WeightView on_device(const format::EncodedMatrix& matrix) {
    format::WeightView view = matrix.view();
    view.data = on_device(matrix.data.data(), matrix.data.size());
    view.scales = on_device(matrix.scales.data(), matrix.scales.size());
    return view;
  }
  std::vector<float> on_host(ConstMatrix matrix) {
    std::vector<float> values(static_cast<std::size_t>(matrix.rows * matrix.cols));
    backend_->download(matrix.data, values.data(), values.size() * sizeof(float));
    return values;
  }
  void expect_linear(WeightFormat format, std::int64_t rows, std::int64_t cols, std::int64_t tokens,
                     Inputs inputs, double tolerance) {
    const ScratchScope scope(*arena_);
    const auto weight =
        random_weight(format, rows, cols, static_cast<std::uint32_t>(rows + tokens));
    OwnedMatrix x(tokens, cols, static_cast<std::uint32_t>(cols));
    OwnedMatrix expected(tokens, rows);
    const OwnedMatrix poison(tokens, rows);
    reference_->linear(weight.view(), x.view(), expected.view());
    const Matrix y = on_device(poison);
    backend_->linear(on_device(weight), on_device(x), y, inputs);
    const std::vector<float> actual = on_host(y);
    EXPECT_LT(relative_error(actual, expected.values), tolerance)
        << format::weight_format_name(format) << " " << rows << "x" << cols << ", " << tokens
        << " tokens";
  }

  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Backend> reference_;
  std::unique_ptr<memory::Arena> arena_;
};

TEST_F(Cuda, LinearOfOddShapes) {
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

TEST_F(Cuda, LinearOfEveryNumberOfTokens) {
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
      for (int i = 0; i < 2; ++i) reference_->linear(weights[i].view(), x.view(), y[i].view());
      backend_->linear_pair(on_device(weights[0]), dy[0], on_device(weights[1]), dy[1], dx);
      for (int i = 0; i < 2; ++i) {
        EXPECT_LT(relative_error(on_host(dy[i]), y[i].values), kTolerance);
      }
    }
  }
}

// So many that blocks take 256 rows and 128 tokens where a GPU has room for that.
TEST_F(Cuda, LinearOfManyTokensAndRows) {
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
    const float* dw = on_device(weight.data(), weight.size());
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
        std::int32_t* ints = on_device(poison.data(), poison.size());
        float* out = on_device(poison_weights.data(), pairs);
        const float* on_gpu_bias = on_device(bias.data(), bias.size());
        backend_->route(spec, on_device(logits), {on_gpu_bias, bias.size()}, given,
                        {{ints, pairs}, {ints + pairs, pairs}, {out, pairs}});
        std::vector<std::int32_t> got(2 * pairs);
        std::vector<float> got_weights(pairs);
        backend_->download(ints, got.data(), got.size() * sizeof(std::int32_t));
        backend_->download(out, got_weights.data(), pairs * sizeof(float));
        EXPECT_TRUE(std::equal(own.begin(), own.end(), got.begin()));
        EXPECT_TRUE(
            std::equal(used.begin(), used.end(), got.begin() + static_cast<std::ptrdiff_t>(pairs)));
        EXPECT_LT(relative_error(got_weights, weights), 1e-6);
      }
    }
  }
}

// Two sequences of different age in one batch, their caches filled by kv_append, then mla_inputs.
class CudaAttention : public Cuda {
 protected:
  struct Case {
    MlaShape shape;
    std::int64_t earlier[2];
    std::int64_t rows[2];
    WeightFormat kv_b = WeightFormat::kBF16;
    // Makes each 64 earlier tokens of the second sequence far likelier than those before to even
    // heads, and far less likely to odd ones: they have so much more as first rotary value.
    float rise = 0.0f;
  };

  std::vector<float> run(Backend& backend, const Case& c, KvFormat kv_format, bool decode) {
    const bool host = backend.host_visible();
    const std::int64_t width = c.shape.cache_width();
    const std::int64_t rows = c.rows[0] + c.rows[1];
    const std::size_t layer =
        static_cast<std::size_t>(kKvBlockTokens * width) * kv_value_bytes(kv_format);
    const std::int64_t room = c.earlier[0] + c.earlier[1] + rows + 4 * kKvBlockTokens;
    engine::KvCache cache(room, 2, layer, kv_format, backend.memory());
    const auto weight =
        random_weight(c.kv_b, c.shape.heads * (c.shape.qk_nope_head_dim + c.shape.v_head_dim),
                      c.shape.kv_lora_rank, 10);
    const auto place = [&](OwnedMatrix& m) { return host ? m.view() : on_device(m); };
    engine::Sequence sequences[2] = {engine::Sequence(cache), engine::Sequence(cache)};
    std::vector<SequenceRows> batch;
    std::int64_t row = 0;
    for (std::size_t i = 0; i < 2; ++i) {
      if (c.earlier[i] > 0) {
        OwnedMatrix earlier(c.earlier[i], width, static_cast<std::uint32_t>(20 + i));
        for (std::int64_t t = 0; i == 1 && c.rise > 0.0f && t < c.earlier[i]; ++t) {
          earlier.view().row(t)[c.shape.kv_lora_rank] =
              c.rise * static_cast<float>(t / kKvBlockTokens);
        }
        SequenceRows before = sequences[i].next_rows(0, c.earlier[i]);
        before.kv.layer_offset = layer;
        before.kv.scale = 0.01f;
        backend.kv_append({&before, 1}, place(earlier));
        sequences[i].advance(c.earlier[i]);
      }
      batch.push_back(sequences[i].next_rows(row, c.rows[i]));
      batch.back().kv.layer_offset = layer;
      batch.back().kv.scale = 0.01f;
      row += c.rows[i];
    }
    OwnedMatrix latents(rows, width, 30);
    OwnedMatrix q(rows, c.shape.heads * c.shape.qk_head_dim(), 31);
    for (float& v : q.values) v = format::bf16_to_float(format::float_to_bf16(v));
    for (std::int64_t r = c.rows[0]; c.rise > 0.0f && r < rows; ++r) {
      for (std::int64_t h = 0; h < c.shape.heads; ++h) {
        q.view().row(r)[h * c.shape.qk_head_dim() + c.shape.qk_nope_head_dim] =
            h % 2 == 0 ? 1024.0f : -1024.0f;
      }
    }
    OwnedMatrix out(rows, c.shape.heads * c.shape.v_head_dim);
    OwnedMatrix q_abs(rows, c.shape.heads * c.shape.kv_lora_rank);
    OwnedMatrix attended(rows, c.shape.heads * c.shape.kv_lora_rank);
    const format::WeightView w = host ? weight.view() : on_device(weight);
    const Matrix q_view = place(q);
    OwnedMatrix angles(rows, c.shape.qk_rope_head_dim, 32);
    const std::vector<float> norm = random_values(c.shape.kv_lora_rank, 33);
    const float* norm_there = host ? norm.data() : on_device(norm.data(), norm.size());
    backend.mla_inputs(c.shape, batch, place(angles), {norm_there, norm.size()}, 1e-6f, q_view,
                       place(latents));
    const Matrix out_view = place(out);
    if (decode) {
      const Matrix abs_view = place(q_abs);
      const Matrix attended_view = place(attended);
      backend.absorb_query(c.shape, w, q_view, abs_view);
      backend.latent_attention(c.shape, batch, abs_view, q_view, attended_view);
      backend.expand_value(c.shape, w, attended_view, out_view);
    } else {
      backend.prefill_attention(c.shape, w, batch, q_view, out_view);
    }
    return host ? out.values : on_host(out_view);
  }

  void expect_agreement(const Case& c) {
    for (const bool decode : {false, true}) {
      for (const KvFormat kv : {KvFormat::kBf16, KvFormat::kFp8}) {
        const ScratchScope scope(*arena_);
        const std::vector<float> expected = run(*reference_, c, kv, decode);
        EXPECT_LT(relative_error(run(*backend_, c, kv, decode), expected), kTolerance)
            << "decode " << decode << " fp8 " << (kv == KvFormat::kFp8) << " heads "
            << c.shape.heads;
      }
    }
  }
};

TEST_F(CudaAttention, OddHeads) {
  expect_agreement({{3, 48, 24, 20, 40, 0.13f}, {70, 3}, {5, 2}});
  expect_agreement({{2, 32, 16, 8, 24, 0.2f}, {0, 130}, {1, 1}, WeightFormat::kFp8Block});
}

TEST_F(CudaAttention, RealHeads) {
  expect_agreement({{4, 512, 128, 64, 128, 0.02f}, {70, 3}, {5, 66}});
  expect_agreement({{16, 512, 128, 64, 128, 0.02f}, {300, 0}, {1, 1}, WeightFormat::kFp8Block});
  expect_agreement({{20, 512, 128, 64, 128, 0.02f}, {63, 127}, {2, 1}});
  expect_agreement(
      {{70, 512, 128, 64, 128, 0.02f}, {0, 257}, {130, 1}, WeightFormat::kBF16, 0.64f});
  expect_agreement({{3, 512, 128, 64, 128, 0.02f}, {500, 0}, {70, 64}, WeightFormat::kNvfp4});
  expect_agreement({{2, 512, 128, 64, 128, 0.02f}, {77, 0}, {300, 5}});  // several blocks of rows
}

struct ExpertsCase {
  WeightFormat gate, up, down;
  std::int64_t experts, top_k, hidden, intermediate, tokens;
};

class CudaExperts : public Cuda, public ::testing::WithParamInterface<ExpertsCase> {};

TEST_P(CudaExperts, AgreeWithReference) {
  const ExpertsCase c = GetParam();
  std::vector<format::EncodedMatrix> matrices;
  matrices.reserve(static_cast<std::size_t>(3 * c.experts));
  std::vector<ExpertView> host;
  std::vector<ExpertView> device;
  for (std::int64_t e = 0; e < c.experts; ++e) {
    const auto seed = static_cast<std::uint32_t>(100 + 3 * e);
    const auto next = [&](WeightFormat format, std::int64_t rows, std::int64_t cols,
                          int i) -> const format::EncodedMatrix& {
      matrices.push_back(random_weight(format, rows, cols, seed + static_cast<std::uint32_t>(i)));
      return matrices.back();
    };
    const auto& gate = next(c.gate, c.intermediate, c.hidden, 0);
    const auto& up = next(c.up, c.intermediate, c.hidden, 1);
    const auto& down = next(c.down, c.hidden, c.intermediate, 2);
    host.push_back({gate.view(), up.view(), down.view()});
    device.push_back({on_device(gate), on_device(up), on_device(down)});
  }
  OwnedMatrix x(c.tokens, c.hidden, 43);
  OwnedMatrix y(c.tokens, c.hidden, 44);  // what the shared experts gave
  const std::int64_t pairs = c.tokens * c.top_k;
  const auto count = static_cast<std::size_t>(pairs);
  const std::vector<float> weights = random_values(pairs, 45);
  std::vector<std::int32_t> used(count);
  std::vector<std::vector<std::int32_t>> by_expert(static_cast<std::size_t>(c.experts));
  for (std::int64_t p = 0; p < pairs; ++p) {  // distinct within a token; expert 1 is never chosen
    std::int64_t e = (p / c.top_k * 5 + p % c.top_k) % c.experts;
    if (c.experts > c.top_k && e == 1) e = (p / c.top_k * 5 + c.top_k) % c.experts;
    used[static_cast<std::size_t>(p)] = static_cast<std::int32_t>(e);
    by_expert[static_cast<std::size_t>(e)].push_back(static_cast<std::int32_t>(p));
  }
  const Matrix dy = on_device(y);
  std::vector<ExpertTask> tasks;
  for (std::size_t e = 0; e < host.size(); ++e) {
    if (!by_expert[e].empty()) tasks.push_back({&host[e], by_expert[e]});
  }
  OwnedMatrix hidden(pairs, c.intermediate);
  OwnedMatrix routed(pairs, c.hidden);
  const Matrix dhidden = on_device(hidden);
  const Matrix drouted = on_device(routed);
  reference_->experts(tasks, c.top_k, x.view(), hidden.view(), routed.view());
  reference_->combine(routed.view(), weights, c.top_k, y.view());

  std::int32_t* dused = on_device(used.data(), count);
  std::vector<float> weights_copy = weights;
  float* dweights = on_device(weights_copy.data(), count);
  const Routing routing{{dused, count}, {dused, count}, {dweights, count}};
  ASSERT_TRUE(backend_->routed_experts(device, routing, c.top_k, on_device(x), dhidden, drouted, dy,
                                       nullptr));
  EXPECT_LT(relative_error(on_host(dy), y.values), kTolerance);

  // Expert 1 as the shared one: with the others, or alone before them.
  if (!backend_->takes_shared(device, device[1], c.tokens, c.top_k)) return;
  std::vector<std::int32_t> all(static_cast<std::size_t>(c.tokens));
  std::iota(all.begin(), all.end(), 0);
  OwnedMatrix shared_hidden(c.tokens, c.intermediate);
  OwnedMatrix expected(c.tokens, c.hidden);
  const ExpertTask one[] = {{&host[1], all}};
  reference_->experts(one, 1, x.view(), shared_hidden.view(), expected.view());
  reference_->combine(routed.view(), weights, c.top_k, expected.view());
  const OwnedMatrix more(pairs + c.tokens, c.intermediate);
  ASSERT_TRUE(backend_->routed_experts(device, routing, c.top_k, on_device(x), on_device(more),
                                       drouted, dy, &device[1]));
  EXPECT_LT(relative_error(on_host(dy), expected.values), kTolerance);
}

constexpr auto kNv = WeightFormat::kNvfp4;
constexpr auto kMx = WeightFormat::kMxfp4;
constexpr auto kF8 = WeightFormat::kFp8Block;
constexpr auto kBf = WeightFormat::kBF16;
INSTANTIATE_TEST_SUITE_P(
    All, CudaExperts,
    ::testing::Values(ExpertsCase{kNv, kF8, kNv, 4, 2, 96, 48, 3},     // mixed
                      ExpertsCase{kNv, kNv, kNv, 12, 3, 144, 80, 5},   // rows of no 16 bytes
                      ExpertsCase{kBf, kBf, kBf, 6, 2, 51, 27, 4},     // odd
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
                      ExpertsCase{kNv, kNv, kNv, 3, 2, 512, 256, 300},  // over 128 an expert
                      ExpertsCase{kF8, kF8, kF8, 3, 2, 384, 256, 300},
                      ExpertsCase{kBf, kBf, kBf, 3, 2, 160, 96, 300}));

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
  EXPECT_THROW(make_cuda_backend(0, 1000), MemoryLimitError);
  const auto limited = make_cuda_backend(0, 3'000'000'000);
  try {
    const memory::Arena arena(std::size_t{3} << 30, "a test", limited->memory());
    FAIL() << "3.2 GB within 3 GB";
  } catch (const MemoryLimitError& error) {
    EXPECT_EQ(error.needed(), std::size_t{3} << 30);
    EXPECT_LT(error.available(), 3'000'000'000u);
    EXPECT_NE(std::string(error.what()).find("VRAM"), std::string::npos);
  }
  try {
    const memory::Arena arena(std::size_t{1} << 42, "a test", backend_->memory());
    FAIL() << "4 TB";
  } catch (const MemoryLimitError& error) {
    EXPECT_GT(error.available(), 0u);
  }
}

}  // namespace
}  // namespace dsfp4::ops
