// Every setting of the tiers beside a GPU does what it says, and memory_limit holds.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <optional>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "engine/three_tiers_fixture.h"

namespace dsfp4::engine {
namespace {

double gb(double bytes) { return bytes * 1e-9; }

ModelStats since(const ModelStats& before, ModelStats after) {
  after.misses -= before.misses;
  after.uploads -= before.uploads;
  after.device_hits -= before.device_hits;
  after.cpu_bytes -= before.cpu_bytes;
  after.used_bytes -= before.used_bytes;
  return after;
}

class TierSettings : public ThreeTiersFixture {
 protected:
  // Experts of no tier but the files, copied to the GPU.
  static LoadOptions options() {
    LoadOptions options = load_options();
    options.strategy.max_experts = 0;
    options.strategy.cpu_cache_size = 0.0;
    options.memory.cpu_share = 0.0;
    options.memory.prefetch_layers = 0;
    options.cache_policy = "lru";
    options.quantization.emplace();  // all as published, and in VRAM
    options.strategy.min_layers = kModelLayers;
    return options;
  }
  // Counts of the second ask(), when the caches are full.
  ModelStats second_ask(Engine& engine) {
    EXPECT_EQ(ask(engine), right_);
    const ModelStats before = engine.stats();
    EXPECT_EQ(ask(engine), right_);
    return since(before, engine.stats());
  }
  static Floats decode(Engine& engine) {
    const Ids ids = {3, 10, 17, 24, 1, 8, 15, 22};
    Floats logits(ids.size() * static_cast<std::size_t>(engine.spec().vocab_size));
    ForwardOptions forward;
    forward.decode = true;
    engine.forward(ids, logits, forward);
    return logits;
  }
  static void expect_same_numbers(const ModelStats& one, const ModelStats& two) {
    EXPECT_EQ(one.slots, two.slots);
    EXPECT_EQ(one.cache_slots, two.cache_slots);
    EXPECT_EQ(one.device_slots, two.device_slots);
    EXPECT_EQ(one.device_cache_slots, two.device_cache_slots);
    EXPECT_EQ(one.reserved_bytes, two.reserved_bytes);
  }
};

TEST_P(TierSettings, MaxExpertsStayInVram) {
  const auto engine = load(options(), as_a_gpu());
  const ModelStats none = second_ask(*engine);
  EXPECT_EQ(none.device_hits, 0u);
  EXPECT_GT(none.uploads, 0u);
  MemoryStrategy strategy = options().strategy;
  strategy.max_experts = 5;
  engine->set_memory_strategy(strategy);
  const ModelStats some = second_ask(*engine);
  EXPECT_EQ(some.device_cache_slots, 5u);
  EXPECT_GT(some.device_hits, 0u);
  strategy.max_experts.reset();
  engine->set_memory_strategy(strategy);
  const ModelStats all = second_ask(*engine);
  EXPECT_EQ(all.uploads, 0u);
  EXPECT_GT(all.device_hits, some.device_hits);
}

TEST_P(TierSettings, GpuReservedIsLeftToOthers) {
  const std::uint64_t least = least_vram(options());
  ops::testing::EmulatedOptions device = as_a_gpu();
  const std::uint64_t slot = load(options(), device)->stats().device_slot_bytes;
  device.memory_limit = least + 6 * slot + kRounding;
  LoadOptions loading = options();
  loading.strategy.max_experts.reset();
  loading.strategy.gpu_reserved = gb(2.5 * static_cast<double>(slot));
  const auto engine = load(loading, device);
  EXPECT_EQ(second_ask(*engine).device_cache_slots, 3u);
  EXPECT_GE(device_->memory().available(), kRounding + 2 * slot + slot / 2);
  MemoryStrategy strategy = loading.strategy;
  strategy.gpu_reserved = 0.0;
  engine->set_memory_strategy(strategy);
  EXPECT_EQ(second_ask(*engine).device_cache_slots, 6u);
  strategy.gpu_reserved = gb(7.0 * static_cast<double>(slot));
  EXPECT_THROW(engine->set_memory_strategy(strategy), MemoryLimitError);
  EXPECT_EQ(second_ask(*engine).device_cache_slots, 6u);
}

TEST_P(TierSettings, CpuCacheSizeIsWhatStaysInRam) {
  const auto engine = load(options(), as_a_gpu());
  const ModelStats none = second_ask(*engine);
  EXPECT_EQ(none.cache_slots, 0u);
  MemoryStrategy strategy = options().strategy;
  strategy.cpu_cache_size = gb(5.5 * static_cast<double>(none.slot_bytes));
  engine->set_memory_strategy(strategy);
  const ModelStats some = second_ask(*engine);
  EXPECT_EQ(some.cache_slots, 5u);
  EXPECT_EQ(some.slots - some.cache_slots, none.slots);
  strategy.cpu_cache_size = 1.0;
  engine->set_memory_strategy(strategy);
  const ModelStats all = second_ask(*engine);
  EXPECT_EQ(all.misses, 0u);
  EXPECT_LT(all.misses, some.misses);
  EXPECT_LE(some.misses, none.misses);
}

TEST_P(TierSettings, PrefetchSizeIsOfSlotsBesideTheCache) {
  LoadOptions loading = options();
  const std::uint64_t slot = load(loading, as_a_gpu())->stats().slot_bytes;
  loading.strategy.cpu_cache_size = gb(2.0 * static_cast<double>(slot));
  std::optional<std::uint64_t> before;
  const auto engine = load(loading, as_a_gpu());
  for (const int slots : {1, 2, 7}) {
    MemoryStrategy strategy = loading.strategy;
    strategy.prefetch_size = gb((slots + 0.5) * static_cast<double>(slot));
    engine->set_memory_strategy(strategy);
    const ModelStats stats = second_ask(*engine);
    EXPECT_EQ(stats.cache_slots, 2u);
    EXPECT_EQ(stats.slots, 2u + static_cast<std::uint64_t>(slots));
    const std::uint64_t others = device_->staging().used() - stats.slots * slot;
    EXPECT_EQ(before.value_or(others), others);
    before = others;
  }
  MemoryStrategy none = loading.strategy;
  none.prefetch_size = gb(0.5 * static_cast<double>(slot));
  EXPECT_THROW(engine->set_memory_strategy(none), ParameterError);
}

TEST_P(TierSettings, CpuShareIsOfTheBytesThatLieInRam) {
  const auto engine = load(options(), as_a_gpu());
  const std::uint64_t expert = engine->stats().image_bytes;
  for (const double share : {0.0, 0.25, 0.5, 1.0}) {
    MemoryConfig config = options().memory;
    config.cpu_share = share;
    engine->set_memory_config(config);
    const ModelStats before = engine->stats();
    decode(*engine);
    const ModelStats took = since(before, engine->stats());
    const double wanted = share * static_cast<double>(took.used_bytes);
    EXPECT_LE(std::abs(static_cast<double>(took.cpu_bytes) - wanted), static_cast<double>(expert))
        << share;
  }
}

// The processor computes all, so that both models' stores see the same.
TEST_P(TierSettings, ExpertThresholdLeavesOutAsWithoutAGpu) {
  LoadOptions loading = options();
  loading.memory.cpu_share = 1.0;
  Floats exact;
  for (const double threshold : {0.0, 0.4, 1.0}) {
    loading.memory.expert_threshold = threshold;
    const auto engine = load(loading, as_a_gpu());
    LoadOptions in_ram = loading;
    in_ram.memory.cpu_share.reset();
    in_ram.strategy.max_experts.reset();
    in_ram.strategy.min_layers.reset();
    Engine beside(folder_.path(), in_ram);
    ASSERT_TRUE(beside.stats().tiered);
    const Floats got = decode(*engine);
    EXPECT_EQ(got, decode(beside)) << threshold;
    const ModelStats stats = engine->stats();
    EXPECT_EQ(stats.skipped_pairs, beside.stats().skipped_pairs);
    if (threshold == 0.0) exact = got;
    EXPECT_EQ(got == exact, stats.skipped_pairs == 0) << threshold;
    EXPECT_EQ(stats.skipped_pairs > 0, threshold > 0.0) << threshold;
    engine->set_memory_config(options().memory);
    EXPECT_EQ(ask(*engine), right_);
  }
}

// The plan is the least that loads, and as many slots as fit.
TEST_P(TierSettings, VramNeverExceedsThePlan) {
  const std::uint64_t least = least_vram(options());
  ops::testing::EmulatedOptions device = as_a_gpu();
  const std::uint64_t slot = load(options(), device)->stats().device_slot_bytes;
  for (const std::uint64_t experts : {0, 1, 4, 9}) {
    const std::uint64_t planned = least + experts * slot;
    device.memory_limit = planned + kRounding;
    LoadOptions loading = options();
    loading.strategy.max_experts.reset();
    loading.strategy.cpu_cache_size = gb(40e3);
    const auto engine = load(loading, device);
    EXPECT_EQ(engine->stats().device_cache_slots, experts);
    Ids prompt(60, 7);
    for (std::size_t i = 0; i < prompt.size(); ++i) prompt[i] = static_cast<std::int32_t>(i % 30);
    GenerateOptions generate;
    generate.max_tokens = 4;
    generate.stop_ids.emplace();
    engine->generate(prompt, generate, {});
    EXPECT_EQ(ask(*engine), right_);
    EXPECT_LE(device_->memory().peak(), planned) << experts;
    MemoryStrategy strategy = loading.strategy;
    for (const std::int64_t most : {std::int64_t{0}, static_cast<std::int64_t>(experts)}) {
      strategy.max_experts = most;
      engine->set_memory_strategy(strategy);
      EXPECT_EQ(ask(*engine), right_);
    }
    strategy.max_experts = experts + 1;
    EXPECT_THROW(engine->set_memory_strategy(strategy), MemoryLimitError);
    EXPECT_EQ(engine->stats().device_cache_slots, experts);
    EXPECT_EQ(ask(*engine), right_);
    EXPECT_LE(device_->memory().peak(), planned) << experts;
  }
}

TEST_P(TierSettings, AStrategyThatFailsByHalvesLeavesTheOldNumbers) {
  LoadOptions loading = options();
  loading.strategy.max_experts = 3;
  loading.strategy.cpu_cache_size = gb(40e3);
  const auto engine = load(loading, as_a_gpu());
  EXPECT_EQ(ask(*engine), right_);
  const ModelStats before = engine->stats();
  const std::size_t vram = device_->memory().used();
  const std::size_t ram = device_->staging().used();
  MemoryStrategy larger;
  larger.max_experts = 7;
  larger.cpu_cache_size = gb(80e3);
  for (const bool of_vram : {true, false}) {
    if (of_vram) {
      device_->memory().fail_allocation(1);
    } else {
      device_->staging().set_limit(ram);
    }
    EXPECT_THROW(engine->set_memory_strategy(larger), MemoryLimitError) << of_vram;
    expect_same_numbers(engine->stats(), before);
    EXPECT_EQ(device_->memory().used(), vram) << of_vram;
    EXPECT_EQ(device_->staging().used(), ram) << of_vram;
    EXPECT_EQ(ask(*engine), right_) << of_vram;
  }
  device_->staging().set_limit(std::size_t{64} << 20);
  engine->set_memory_strategy(larger);
  EXPECT_EQ(engine->stats().device_cache_slots, 7u);
  EXPECT_GT(engine->stats().cache_slots, before.cache_slots);
  EXPECT_EQ(ask(*engine), right_);
}

TEST_P(TierSettings, SlotsGrowToAllRamThatThereIs) {
  const auto engine = load(options(), as_a_gpu());
  EXPECT_EQ(ask(*engine), right_);
  const std::uint64_t slot = engine->stats().slot_bytes;
  device_->staging().set_limit(device_->staging().used() + 10 * slot);
  MemoryStrategy strategy = options().strategy;
  strategy.cpu_cache_size = gb(10.5 * static_cast<double>(slot));
  engine->set_memory_strategy(strategy);
  EXPECT_EQ(engine->stats().cache_slots, 10u);
  EXPECT_EQ(device_->staging().available(), 0u);
  EXPECT_EQ(ask(*engine), right_);
  strategy.cpu_cache_size = gb(11.5 * static_cast<double>(slot));
  EXPECT_THROW(engine->set_memory_strategy(strategy), MemoryLimitError);
  EXPECT_EQ(ask(*engine), right_);
}

INSTANTIATE_TEST_SUITE_P(Kinds, TierSettings, ::testing::ValuesIn(dsfp4::testing::kTinyKinds));

}  // namespace
}  // namespace dsfp4::engine
