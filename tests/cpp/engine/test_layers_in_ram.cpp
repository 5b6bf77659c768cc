// A model whose dense weights do not all fit in VRAM: those of some layers are copied for each
// step.
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "base/warnings.h"
#include "dsfp4/error.h"
#include "engine/three_tiers_fixture.h"

namespace dsfp4::engine {
namespace {

using dsfp4::testing::TinyKind;
using ops::Queue;

class LayersInRam : public ThreeTiersFixture {
 protected:
  static LoadOptions options(std::optional<std::int64_t> max_gpu_layers = {}) {
    LoadOptions options = load_options();
    options.strategy.max_experts = 1;
    options.strategy.max_gpu_layers = max_gpu_layers;
    options.memory.cpu_share = 0.0;
    options.quantization.emplace();  // all as published
    return options;
  }
};

INSTANTIATE_TEST_SUITE_P(All, LayersInRam,
                         ::testing::Values(TinyKind::kNvfp4, TinyKind::kBf16, TinyKind::kMixed));

TEST_P(LayersInRam, AnyNumberOfThemChangesNoBit) {
  for (std::int64_t stay = 0; stay <= kModelLayers; ++stay) {
    for (const std::int64_t ahead : {0, 1, 2, 16}) {
      LoadOptions some = options(stay);
      some.memory.prefetch_layers = ahead;
      const auto engine = load(some, as_a_gpu());
      EXPECT_TRUE(ask(*engine) == right_) << stay;
      EXPECT_TRUE(ask(*engine) == right_) << stay;
      const auto streamed = static_cast<std::int64_t>(engine->stats().streamed_layers);
      EXPECT_LE(kModelLayers - streamed, std::max<std::int64_t>(stay, 0)) << ahead;
      EXPECT_EQ(streamed > 0, stay < kModelLayers);
    }
  }
}

TEST_P(LayersInRam, EachCrossesPcieOnceAStep) {
  const auto engine = load(options(0), as_a_gpu());
  const auto copied = [&](std::int64_t tokens) {
    const std::uint64_t before = engine->stats().streamed_bytes;
    const Ids ids(static_cast<std::size_t>(tokens), 5);
    Floats logits(ids.size() * static_cast<std::size_t>(engine->spec().vocab_size));
    ForwardOptions forward;
    forward.decode = true;
    engine->forward(ids, logits, forward);
    return engine->stats().streamed_bytes - before;
  };
  copied(1);  // and what is copied ahead for the next
  const std::uint64_t once = copied(1);
  EXPECT_GT(once, 0u);
  EXPECT_EQ(copied(7), 7 * once);
}

TEST_P(LayersInRam, LessVramIsEnough) {
  LoadOptions all_stay = options();
  all_stay.strategy.min_layers = kModelLayers;
  const std::uint64_t most = least_vram(all_stay);
  const std::uint64_t least = least_vram(options());
  EXPECT_LT(least, most);
  ops::testing::EmulatedOptions device = as_a_gpu();
  for (const std::uint64_t vram : {least, (least + most) / 2, most - 1, most}) {
    device.memory_limit = vram + kRounding;
    const dsfp4::testing::Warnings warnings;
    const auto engine = load(options(), device);
    EXPECT_EQ(warnings.with("lie in RAM and are copied to VRAM for each token").size(),
              vram < most ? 1u : 0u);
    EXPECT_TRUE(ask(*engine) == right_);
    EXPECT_LE(device_->memory().used(), vram);
    EXPECT_EQ(engine->stats().streamed_layers > 0, vram < most);
  }
  device.memory_limit = least + kRounding - 1;
  EXPECT_THROW(load(options(), device), MemoryLimitError);
  device.memory_limit = most + kRounding - 1;
  EXPECT_THROW(load(all_stay, device), MemoryLimitError);
}

TEST_P(LayersInRam, ACopyThatFailsIsMadeAgain) {
  const auto engine = load(options(0), as_a_gpu());
  EXPECT_TRUE(ask(*engine) == right_);
  for (const std::int64_t n : {1, 2, 5, 9}) {
    device_->fail_copy(Queue::kUpload, n);
    EXPECT_THROW(
        {
          for (int i = 0; i < 20; ++i) ask(*engine);
        },
        CudaError);
    device_->clear_error();
    EXPECT_TRUE(ask(*engine) == right_) << n;
  }
}

TEST_P(LayersInRam, LateCopiesAreWaitedFor) {
  const auto engine = load(options(0), as_a_gpu());
  for (std::int64_t n = 1; n < 12; n += 2) {
    device_->delay_copy(Queue::kUpload, n, std::chrono::milliseconds(20));
    EXPECT_TRUE(ask(*engine) == right_) << n;
  }
}

TEST_P(LayersInRam, CancelledAnywhereTheNextTextIsTheSame) {
  const auto engine = load(options(0), as_a_gpu());
  bool left = true;
  for (int at = 1; left; at += 3) {
    int asked = 0;
    GenerateOptions generate;
    generate.max_tokens = 3;
    generate.keep_going = [&] { return ++asked != at; };
    const GenerationResult result = engine->generate(Ids{5, 3, 9, 20, 4, 1}, generate, {});
    left = result.finish_reason == FinishReason::kCancelled;
  }
  EXPECT_TRUE(ask(*engine) == right_);
}

TEST_P(LayersInRam, BadNumbersOfLayersAreNamed) {
  const auto refused = [&](LoadOptions some) -> std::string {
    try {
      load(some, as_a_gpu());
      return "";
    } catch (const ParameterError& error) {
      return error.parameter() + ": " + error.what();
    }
  };
  EXPECT_NE(refused(options(-1)).find("max_gpu_layers"), std::string::npos);
  LoadOptions some = options(2);
  some.strategy.min_layers = 3;
  EXPECT_NE(refused(some).find("'min_layers': must be at most max_gpu_layers, 2, not 3"),
            std::string::npos)
      << refused(some);
  LoadOptions on_cpu = load_options();
  on_cpu.strategy.max_gpu_layers = 1;
  EXPECT_THROW(Engine(folder_.path(), on_cpu), ParameterError);
  const auto engine = load(options(), as_a_gpu());
  MemoryStrategy later;
  later.max_gpu_layers = 1;
  EXPECT_THROW(engine->set_memory_strategy(later, {}), ParameterError);
}

}  // namespace
}  // namespace dsfp4::engine
