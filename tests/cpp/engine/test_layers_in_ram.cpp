// A model whose dense weights do not all fit in VRAM: those of some layers are copied for each
// step.
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "base/warnings.h"
#include "dsfp4/error.h"
#include "engine/three_tiers_fixture.h"
#include "storage/reader_fixture.h"

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
  // How many of what could fail are passed over between two that do.
  static std::int64_t every(std::int64_t quick) {
    return std::getenv("DSFP4_FULL") != nullptr ? 1 : quick;
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
  const auto copied = [&](std::int64_t tokens) { return layers_copied(*engine, tokens); };
  copied(1);  // and what is copied ahead for the next
  const std::uint64_t once = copied(1);
  EXPECT_GT(once, 0u);
  EXPECT_EQ(copied(7), 7 * once);
  // They do not come from the SSD, and the host waits for none.
  EXPECT_EQ(engine->stats().streamed_bytes, 0u);
  EXPECT_EQ(engine->stats().stream_wait_seconds, 0.0);
  EXPECT_GT(engine->stats().layer_upload_wait_seconds, 0.0);
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

// A prompt and two steps.
Ids short_text(Engine& engine, const KeepGoing& keep_going = {}) {
  GenerateOptions generate;
  generate.max_tokens = 3;
  generate.stop_ids.emplace();
  generate.keep_going = keep_going;
  return engine.generate(Ids{5, 3, 9, 20, 4, 1, 8, 15, 22, 29, 6, 13}, generate, {}).tokens;
}

TEST_P(LayersInRam, ACopyThatFailsIsMadeAgain) {
  const auto engine = load(options(0), as_a_gpu());
  const Ids text = short_text(*engine);
  const auto fails = [&] {
    try {
      EXPECT_EQ(short_text(*engine), text);
      device_->synchronize();
      return false;
    } catch (const CudaError&) {
      return true;
    }
  };
  bool failed = true;
  std::int64_t n = 1;
  for (; failed; n += every(7)) {
    device_->fail_copy(Queue::kUpload, n);
    failed = fails();
    device_->clear_error();
    device_->fail_copy(Queue::kUpload, 0);
    EXPECT_EQ(short_text(*engine), text) << n;
  }
  EXPECT_GT(n, 3 * kModelLayers);  // three steps
  EXPECT_TRUE(ask(*engine) == right_);
}

TEST_P(LayersInRam, AReadThatFailsLeavesTheLayersInOrder) {
  storage::FaultSystem system;
  std::atomic<bool> fails = false;
  std::atomic<std::int64_t> reads = 0;
  std::int64_t at = 0;
  system.before = [&](storage::ReadCall&) -> std::optional<int> {
    if (!fails || reads++ < at) return std::nullopt;
    return -EIO;
  };
  reading_.system = &system;
  LoadOptions some = options(0);
  some.strategy.max_experts = 0;
  some.strategy.cpu_cache_size = 0.0;
  some.memory.prefetch_layers = 0;
  const auto engine = load(some, as_a_gpu());
  const Ids text = short_text(*engine);
  const std::size_t vram = device_->memory().used();
  const std::size_t ram = device_->staging().used();
  const auto failed_once = [&] {
    try {
      EXPECT_EQ(short_text(*engine), text);
      return false;
    } catch (const IoError&) {
      return true;
    }
  };
  for (bool failed = true; failed; at += every(5)) {
    reads = 0;
    fails = true;
    failed = failed_once();
    fails = false;
    EXPECT_EQ(short_text(*engine), text) << at;
    EXPECT_EQ(engine->stats().reads_in_flight, 0u);
    EXPECT_EQ(device_->memory().used(), vram);
    EXPECT_EQ(device_->staging().used(), ram);
  }
  EXPECT_GT(at, 20);
}

TEST_P(LayersInRam, WhateverMemoryIsRefusedAllGoesBack) {
  LoadOptions some = options(0);
  some.quantization = {{"attention", "fp8"}, {"o_proj", "fp8"}};
  load(some, as_a_gpu());
  const std::size_t staging = [&] {
    const auto engine = load(some, as_a_gpu());
    return device_->staging().used();
  }();
  const auto refused = [&](std::int64_t allocation, std::size_t staging_limit) {
    Machine machine;
    machine.make_ops = [&] {
      ops::testing::EmulatedOptions device = as_a_gpu();
      device.staging_limit = staging_limit;
      auto made = std::make_unique<EmulatedOps>(device);
      device_ = made->emulated();
      if (allocation > 0) device_->memory().fail_allocation(allocation);
      return made;
    };
    bool thrown = false;
    try {
      const Engine engine(folder_.path(), some, machine);
    } catch (const MemoryLimitError&) {
      thrown = true;
    }
    EXPECT_EQ(device_->memory().used(), 0u) << allocation;
    EXPECT_EQ(device_->staging().used(), 0u) << staging_limit;
    return thrown;
  };
  EXPECT_FALSE(refused(0, staging));
  std::int64_t n = 1;
  while (refused(n, staging)) ++n;
  EXPECT_GT(n, 4);  // weights, slots, activations, KV cache
  for (const std::size_t limit : {staging - 1, staging / 2, std::size_t{1}}) {
    EXPECT_TRUE(refused(0, limit)) << limit;
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
  LoadOptions some = options(0);
  some.strategy.cpu_cache_size = 0.0;
  const auto engine = load(some, as_a_gpu());
  const Ids text = short_text(*engine);
  const std::size_t vram = device_->memory().used();
  const std::size_t ram = device_->staging().used();
  const std::uint64_t slots = engine->stats().slots;
  int asked = 0;
  std::size_t tokens = 0;
  for (int at = 1; tokens < text.size(); at += static_cast<int>(every(3))) {
    asked = 0;
    tokens = short_text(*engine, [&] { return ++asked != at; }).size();
    EXPECT_EQ(short_text(*engine), text) << at;
    EXPECT_EQ(device_->memory().used(), vram);
    EXPECT_EQ(device_->staging().used(), ram);
    // Slots can be taken away and given back: nothing holds one.
    MemoryStrategy fewer = some.strategy;
    fewer.max_experts = 0;
    engine->set_memory_strategy(fewer);
    engine->set_memory_strategy(some.strategy);
    EXPECT_EQ(engine->stats().slots, slots);
  }
  EXPECT_GT(asked, 3 * kModelLayers);
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
