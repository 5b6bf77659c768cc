// Stages that are switched off are waited for, and change no bit.
#include <vector>

#include <gtest/gtest.h>

#include "engine/three_tiers_fixture.h"

namespace dsfp4::engine {
namespace {

using dsfp4::testing::TinyKind;
using ops::Queue;

class ComputeStreamsTest : public ThreeTiersFixture {
 protected:
  // Experts in all tiers, and dense weights of some layers in RAM.
  static LoadOptions options() {
    LoadOptions options = load_options();
    options.strategy.max_experts = 2;
    options.strategy.max_gpu_layers = 1;
    options.strategy.cpu_cache_size = 1e-4;
    options.memory.cpu_share = 0.0;
    options.memory.prefetch_layers = 1;
    options.quantization.emplace();  // all as published
    return options;
  }
};

INSTANTIATE_TEST_SUITE_P(All, ComputeStreamsTest,
                         ::testing::Values(TinyKind::kNvfp4, TinyKind::kBf16, TinyKind::kMixed));

TEST_P(ComputeStreamsTest, AnyOfThemMayBeOff) {
  const auto engine = load(options(), as_a_gpu());
  for (int off = 7; off >= 0; --off) {
    engine->set_compute_streams({(off & 1) == 0, (off & 2) == 0, (off & 4) == 0});
    EXPECT_TRUE(ask(*engine) == right_) << off;
  }
  Engine in_ram(folder_.path(), [] {
    LoadOptions tiered = load_options();
    tiered.strategy.cpu_cache_size = 0.0;
    return tiered;
  }());
  in_ram.set_compute_streams({false, false, false});
  EXPECT_TRUE(ask(in_ram) == right_);
}

TEST_P(ComputeStreamsTest, NothingIsReadAheadWithoutPrefetch) {
  const auto engine = load(options(), as_a_gpu());
  engine->set_compute_streams({.prefetch = false});
  const ModelStats before = engine->stats();
  ask(*engine);
  const ModelStats off = engine->stats();
  EXPECT_EQ(off.speculative_bytes, before.speculative_bytes);
  EXPECT_EQ(off.predicted, before.predicted);
  EXPECT_GT(off.demand_bytes, before.demand_bytes);
  engine->set_compute_streams({});
  ask(*engine);
  EXPECT_GT(engine->stats().predicted, off.predicted);
}

// Waits of the host are what each switch costs.
TEST_P(ComputeStreamsTest, WhatIsOffIsWaitedFor) {
  const auto engine = load(options(), as_a_gpu());
  ask(*engine);
  const auto waits = [&](const ComputeStreams& streams) {
    engine->set_compute_streams(streams);
    ask(*engine);
    const std::int64_t before = device_->counts().host_waits;
    ask(*engine);
    return device_->counts().host_waits - before;
  };
  const std::int64_t on = waits({});
  EXPECT_GT(waits({.compute = false}), on);
  EXPECT_GT(waits({.transfer = false}), on);
}

TEST_P(ComputeStreamsTest, WithoutTransferNoLayerIsCopiedAhead) {
  const auto engine = load(options(), as_a_gpu());
  ask(*engine);
  engine->set_compute_streams({.transfer = false});
  const auto copied = [&](std::int64_t tokens) { return layers_copied(*engine, tokens); };
  copied(1);
  const std::uint64_t once = copied(1);
  EXPECT_GT(once, 0u);
  EXPECT_EQ(copied(5), 5 * once);
}

}  // namespace
}  // namespace dsfp4::engine
