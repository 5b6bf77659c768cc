// Every field of the public options at its limits and beyond: it works, or a ParameterError names
// it, and the Model stays usable.
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "checkpoint/tiny_checkpoint.h"
#include "dsfp4/error.h"
#include "dsfp4/model.h"

namespace dsfp4::testing {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kMost = std::numeric_limits<double>::max();
constexpr double kLeast = std::numeric_limits<double>::denorm_min();
constexpr std::int64_t kMinInt64 = std::numeric_limits<std::int64_t>::min();
constexpr std::int64_t kMaxInt64 = std::numeric_limits<std::int64_t>::max();
constexpr int kMinInt = std::numeric_limits<int>::min();
constexpr int kMaxInt = std::numeric_limits<int>::max();
constexpr std::int64_t kContext = 64;  // of the tiny checkpoint
constexpr std::int32_t kVocab = 32;

/// The parameter that the call's ParameterError names; "" if it does not throw.
template <typename Call>
std::string refused(const Call& call) {
  try {
    call();
  } catch (const ParameterError& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find(error.parameter()), std::string::npos) << message;
    return error.parameter();
  }
  return "";
}

class HostileOptions : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new ScratchFolder;
    make_tiny_checkpoint(TinyKind::kNvfp4).write(folder_->path());
    LoadOptions options;
    options.threads = 1;
    model_ = new Model(Model::load(folder_->path(), options));
  }
  static void TearDownTestSuite() {
    delete model_;
    delete folder_;
  }

  static std::string load_refuses(const LoadOptions& options) {
    return refused([&] { Model::load(folder_->path(), options); });
  }

  // Also checks that what is accepted gives ids of the vocabulary.
  static std::string generate_refuses(const GenerateOptions& options,
                                      const std::vector<std::int32_t>& prompt = {1, 2, 3}) {
    return refused([&] {
      const GenerationResult result = model_->generate(prompt, options);
      EXPECT_LE(std::ssize(result.tokens), kContext - std::ssize(prompt));
      for (const std::int32_t token : result.tokens) {
        EXPECT_GE(token, 0);
        EXPECT_LT(token, kVocab);
      }
    });
  }

  template <typename T>
  void expect(T GenerateOptions::*field, const std::string& name, const std::vector<T>& good,
              const std::vector<T>& bad) {
    for (const bool is_good : {true, false}) {
      for (const T value : is_good ? good : bad) {
        SCOPED_TRACE(name + " = " + std::to_string(value));
        GenerateOptions options;
        options.max_tokens = 2;
        options.temperature = 1.0;
        options.*field = value;
        EXPECT_EQ(generate_refuses(options), is_good ? "" : name);
      }
    }
  }

  static ScratchFolder* folder_;
  static Model* model_;
};

ScratchFolder* HostileOptions::folder_ = nullptr;
Model* HostileOptions::model_ = nullptr;

TEST_F(HostileOptions, Threads) {
  for (const int threads : {0, 1, 64}) {
    LoadOptions options;
    options.threads = threads;
    EXPECT_EQ(load_refuses(options), "") << threads;
  }
  for (const int threads : {kMinInt, -1, 1025, kMaxInt}) {
    LoadOptions options;
    options.threads = threads;
    EXPECT_EQ(load_refuses(options), "threads") << threads;
  }
}

TEST_F(HostileOptions, MaxContext) {
  for (const std::int64_t tokens : {std::int64_t{0}, std::int64_t{1}, kContext}) {
    LoadOptions options;
    options.threads = 1;
    options.max_context = tokens;
    EXPECT_EQ(load_refuses(options), "") << tokens;
  }
  for (const std::int64_t tokens : {kMinInt64, std::int64_t{-1}, kContext + 1, kMaxInt64}) {
    LoadOptions options;
    options.max_context = tokens;
    EXPECT_EQ(load_refuses(options), "max_context") << tokens;
  }
}

TEST_F(HostileOptions, Names) {
  for (const std::string name : {"", "CPU", "gpu", "cpu ", "reference,cpu"}) {
    LoadOptions options;
    options.device = name;
    EXPECT_EQ(load_refuses(options), "device") << name;
  }
  for (const std::string name : {"", "BF16", "fp4", "nan"}) {
    LoadOptions options;
    options.threads = 1;
    options.kv_cache_dtype = name;
    EXPECT_EQ(load_refuses(options), "kv_cache_dtype") << name;
  }
}

TEST_F(HostileOptions, Integers) {
  expect<std::int64_t>(&GenerateOptions::max_tokens, "max_tokens", {1, kMaxInt64},
                       {kMinInt64, -1, 0});
  expect<std::int64_t>(&GenerateOptions::top_k, "top_k", {0, 1, kVocab, kMaxInt64},
                       {kMinInt64, -1});
  expect<int>(&GenerateOptions::logprobs, "logprobs", {0, 1, 20}, {kMinInt, -1, 21, kMaxInt});
  expect<std::uint64_t>(&GenerateOptions::seed, "seed",
                        {0, std::uint64_t{1} << 63, std::numeric_limits<std::uint64_t>::max()}, {});
}

TEST_F(HostileOptions, Reals) {
  expect<double>(&GenerateOptions::temperature, "temperature", {0.0, -0.0, kLeast, 1e-300, 100.0},
                 {-kLeast, -1.0, std::nextafter(100.0, kMost), kMost, -kMost, kNan, -kNan,
                  kInfinity, -kInfinity});
  expect<double>(
      &GenerateOptions::top_p, "top_p", {kLeast, 0.5, 1.0},
      {0.0, -kLeast, -1.0, std::nextafter(1.0, 2.0), kMost, kNan, kInfinity, -kInfinity});
  expect<double>(&GenerateOptions::min_p, "min_p", {0.0, kLeast, 1.0},
                 {-kLeast, -1.0, std::nextafter(1.0, 2.0), kMost, kNan, kInfinity, -kInfinity});
  expect<double>(&GenerateOptions::repetition_penalty, "repetition_penalty",
                 {kLeast, 1e-300, 1.0, 100.0},
                 {0.0, -1.0, std::nextafter(100.0, kMost), kMost, kNan, kInfinity, -kInfinity});
}

TEST_F(HostileOptions, LogitBias) {
  constexpr float kFloatMost = std::numeric_limits<float>::max();
  constexpr float kFloatInfinity = std::numeric_limits<float>::infinity();
  GenerateOptions options;
  options.max_tokens = 3;
  options.temperature = 1.0;
  options.logit_bias = {{0, -kFloatInfinity}, {1, kFloatMost},  {1, kFloatMost},
                        {2, -kFloatMost},     {2, -kFloatMost}, {kVocab - 1, 0.0f}};
  EXPECT_EQ(generate_refuses(options), "");
  for (const std::int32_t id : {kMinInt, -1, kVocab, kMaxInt}) {
    options.logit_bias = {{id, 0.0f}};
    EXPECT_EQ(generate_refuses(options), "logit_bias") << id;
  }
  for (const float bias : {std::nanf(""), kFloatInfinity}) {
    options.logit_bias = {{3, bias}};
    EXPECT_EQ(generate_refuses(options), "logit_bias") << bias;
  }
  options.logit_bias.clear();
  for (std::int32_t id = 0; id < kVocab; ++id) options.logit_bias.emplace_back(id, -kFloatInfinity);
  EXPECT_THROW(model_->generate(std::vector<std::int32_t>{1}, options), Error);
}

TEST_F(HostileOptions, StopIds) {
  GenerateOptions options;
  options.max_tokens = 2;
  options.stop_ids = {0, kVocab - 1, 0};
  EXPECT_EQ(generate_refuses(options), "");
  for (const std::int32_t id : {kMinInt, -1, kVocab, kMaxInt}) {
    options.stop_ids = {id};
    EXPECT_EQ(generate_refuses(options), "stop_ids") << id;
  }
}

TEST_F(HostileOptions, Prompts) {
  GenerateOptions options;
  options.max_tokens = kMaxInt64;
  options.stop_ids.emplace();
  const auto length = static_cast<std::size_t>(kContext);
  EXPECT_EQ(generate_refuses(options, std::vector<std::int32_t>(length - 1, 1)), "");
  EXPECT_EQ(generate_refuses(options, {}), "prompt");
  for (const std::int32_t id : {kMinInt, -1, kVocab, kMaxInt}) {
    EXPECT_EQ(generate_refuses(options, {1, id}), "prompt") << id;
  }
  for (const std::size_t ids : {length, length + 1, std::size_t{1'000'000}}) {
    try {
      model_->generate(std::vector<std::int32_t>(ids, 1), options);
      ADD_FAILURE() << ids << " ids were taken";
    } catch (const ContextLengthError& error) {
      EXPECT_EQ(error.limit(), kContext);
      EXPECT_GT(error.requested(), kContext);
    }
  }
}

TEST_F(HostileOptions, Forward) {
  const std::vector<std::int32_t> ids = {1, 2};
  std::vector<float> logits(2 * kVocab);
  const std::size_t pairs = 4;  // 1 MoE layer, 2 tokens, 2 experts each
  const auto refuses = [&](const ForwardOptions& options) {
    return refused([&] { model_->forward(ids, logits, options); });
  };
  std::vector<std::int32_t> experts = {3, 0, 3, 0};
  ForwardOptions forced;
  forced.forced_experts = experts;
  EXPECT_EQ(refuses(forced), "");
  for (const std::int32_t expert : {kMinInt, -1, 4, kMaxInt}) {
    experts = {3, 0, 3, expert};
    EXPECT_EQ(refuses(forced), "experts") << expert;
  }
  for (const std::size_t size : {std::size_t{1}, pairs - 1, pairs + 1}) {
    std::vector<std::int32_t> wrong(size);
    ForwardOptions options;
    options.forced_experts = wrong;
    EXPECT_EQ(refuses(options), "experts") << size;
    options = {};
    options.chosen_experts = wrong;
    EXPECT_EQ(refuses(options), "chosen_experts") << size;
  }
  for (const std::size_t size : {std::size_t{1}, logits.size() - 1, logits.size() + 1}) {
    std::vector<float> wrong(size);
    EXPECT_EQ(refused([&] { model_->forward(ids, wrong); }), "logits") << size;
  }
  for (const std::int32_t id : {kMinInt, -1, kVocab, kMaxInt}) {
    const std::vector<std::int32_t> bad = {1, id};
    EXPECT_EQ(refused([&] { model_->forward(bad, logits); }), "ids") << id;
  }
  EXPECT_EQ(refused([&] { model_->forward({}, {}); }), "ids");
  const std::vector<std::int32_t> many(1'000'000, 1);
  EXPECT_THROW(model_->forward(many, {}), ContextLengthError);

  model_->forward(ids, logits);  // still usable
  for (const float logit : logits) EXPECT_TRUE(std::isfinite(logit));
}

TEST_F(HostileOptions, LogitsInWindows) {
  const std::int64_t count = kLogitRows + 8;
  const std::vector<std::int32_t> ids(static_cast<std::size_t>(count), 3);
  std::vector<float> logits(static_cast<std::size_t>(count * kVocab));
  for (const bool decode : {false, true}) {
    ForwardOptions options;
    options.decode = decode;
    model_->forward(ids, logits, options);
    std::vector<float> seen;
    options.on_logits = [&](std::int64_t first, std::span<const float> rows) {
      EXPECT_EQ(first * kVocab, std::ssize(seen));
      EXPECT_LE(std::ssize(rows), kLogitRows * kVocab);
      seen.insert(seen.end(), rows.begin(), rows.end());
    };
    EXPECT_EQ(refused([&] { model_->forward(ids, logits, options); }), "logits");
    model_->forward(ids, {}, options);
    EXPECT_EQ(seen, logits);
    options.on_logits = [](std::int64_t, std::span<const float>) { throw std::range_error("own"); };
    EXPECT_THROW(model_->forward(ids, {}, options), std::range_error);
  }
  model_->forward(ids, logits);  // still usable
}

}  // namespace
}  // namespace dsfp4::testing
