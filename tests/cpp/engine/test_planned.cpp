// Models of one process share its RAM; and what a load may take is decided before it takes it.
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include <gtest/gtest.h>

#include "checkpoint/tiny_checkpoint.h"
#include "dsfp4/error.h"
#include "engine/engine.h"
#include "engine/options.h"
#include "engine/planned.h"

namespace dsfp4::engine {
namespace {

constexpr std::uint64_t kGb = 1'000'000'000;

// A machine without end, on which nothing that is reserved is ever written.
class PlannedModels : public ::testing::Test {
 protected:
  static memory::MachineMemory boundless() {
    return {std::uint64_t{1} << 50, std::uint64_t{1} << 50, 0};
  }

  // 100 experts, 120 bytes a slot.
  static residency::ModelBytes model() {
    residency::ModelBytes model;
    model.dense = 1000;
    model.experts = 100;
    model.expert_bytes = 12'000;
    model.expert_slot = 120;
    model.experts_per_token = 4;
    model.steps = {{256, 100}};
    return model;
  }

  LoadOptions within(std::uint64_t room) const {
    LoadOptions options;
    options.ram_limit = room + memory::kUncountedBytes;
    return options;
  }

  memory::Account account_;
  Machine machine_{{}, boundless, &account_};
};

TEST_F(PlannedModels, TheSecondGetsWhatTheFirstLeaves) {
  const LoadOptions options = within(16'000 + memory::kUncountedBytes);
  std::optional<Planned> first(std::in_place, model(), options, 64, machine_, std::nullopt);
  EXPECT_FALSE(first->plan().tiered);
  {
    const Planned second(model(), options, 64, machine_, std::nullopt);
    EXPECT_TRUE(second.plan().tiered);
    EXPECT_EQ(second.plan().slots, (16'000u - 13'100 - 1100) / 120);
    EXPECT_THROW(Planned(model(), options, 64, machine_, std::nullopt), MemoryLimitError);
  }
  first.reset();
  EXPECT_FALSE(Planned(model(), options, 64, machine_, std::nullopt).plan().tiered);
}

TEST_F(PlannedModels, ACacheGrowsIntoWhatAnotherModelGaveBack) {
  LoadOptions options = within(16'000 + memory::kUncountedBytes);
  options.strategy.cpu_cache_size = 0.0;
  std::optional<Planned> first(std::in_place, model(), within(1 << 30), 64, machine_, std::nullopt);
  Planned second(model(), options, 64, machine_, std::nullopt);
  EXPECT_EQ(second.plan().cache_slots, 0u);
  MemoryStrategy larger;
  larger.cpu_cache_size = 20 * 120 / 1e9;
  const auto nothing = [](const residency::Plan&) {};
  EXPECT_THROW(second.change(larger, nothing), MemoryLimitError);
  first.reset();
  second.change(larger, nothing);
  EXPECT_EQ(second.plan().cache_slots, 20u);
  EXPECT_EQ(account_.committed(boundless()).process,
            second.plan().ram_bytes + memory::kUncountedBytes);
}

TEST_F(PlannedModels, AChangeThatFailsLeavesEverythingAsItWas) {
  LoadOptions options = within(16'000);
  options.strategy.cpu_cache_size = 0.0;
  Planned planned(model(), options, 64, machine_, std::nullopt);
  const std::uint64_t before = account_.committed(boundless()).process;
  EXPECT_THROW(planned.change({}, [](const residency::Plan&) { throw std::runtime_error("no"); }),
               std::runtime_error);
  EXPECT_EQ(planned.plan().cache_slots, 0u);
  EXPECT_EQ(account_.committed(boundless()).process, before);
}

TEST_F(PlannedModels, WhatOnlyLoadingTakesIsGivenBack) {
  residency::ModelBytes bytes = model();
  bytes.load_buffer = 5000;
  Planned planned(bytes, within(6000), 64, machine_, std::uint64_t{1} << 40);
  EXPECT_EQ(account_.committed(boundless()).process, 5000 + memory::kUncountedBytes);
  planned.loaded();
  EXPECT_EQ(account_.committed(boundless()).process, memory::kUncountedBytes);
}

// The same on a GPU that does not hold it whole.
constexpr std::uint64_t kVram = 6000;

residency::ModelBytes in_tiers(residency::ModelBytes model) {
  model.device_slot = 128;
  model.embedding = model.host_embedding = 200;
  return model;
}

TEST_F(PlannedModels, AGpusSlotsChangeAndWhatIsReservedStays) {
  LoadOptions options = within(20'000);
  options.strategy.max_experts = 5;
  options.strategy.gpu_reserved = 1000 / 1e9;
  Planned planned(in_tiers(model()), options, 64, machine_, kVram);
  EXPECT_TRUE(planned.plan().tiered);
  EXPECT_EQ(planned.plan().device_slots, 5 + residency::kDeviceRing);
  const auto nothing = [](const residency::Plan&) {};
  planned.change({}, nothing);
  // 800 dense, 100 a step, 8 slots of 128 that are not cached.
  EXPECT_EQ(planned.plan().device_cache_slots, (5000u - 900 - 1024) / 128);
  MemoryStrategy wanted;
  wanted.gpu_reserved = 0.0;
  planned.change(wanted, nothing);
  EXPECT_EQ(planned.plan().device_cache_slots, (6000u - 900 - 1024) / 128);
  planned.change({}, nothing);
  EXPECT_EQ(planned.plan().device_cache_slots, (6000u - 900 - 1024) / 128);
  wanted.max_experts = 1000;
  EXPECT_THROW(planned.change(wanted, nothing), MemoryLimitError);
  wanted.max_experts = 0;
  planned.change(wanted, [](const residency::Plan& next) {
    EXPECT_EQ(next.device_slots, residency::kDeviceRing);
  });
  EXPECT_EQ(planned.plan().device_cache_slots, 0u);
}

// The old slots become the new ones: they never lie side by side.
TEST_F(PlannedModels, SlotsBesideAGpuGrowToAllThatTheLimitLeaves) {
  LoadOptions options = within(9'000);
  options.strategy.cpu_cache_size = 30 * 120 / 1e9;
  Planned planned(in_tiers(model()), options, 64, machine_, kVram);
  EXPECT_EQ(planned.plan().cache_slots, 30u);
  MemoryStrategy larger;
  larger.cpu_cache_size = 60 * 120 / 1e9;
  planned.change(larger, [&](const residency::Plan& next) {
    EXPECT_EQ(account_.committed(boundless()).process, next.ram_bytes + memory::kUncountedBytes);
  });
  EXPECT_EQ(planned.plan().cache_slots, 60u);
  larger.cpu_cache_size = 70 * 120 / 1e9;
  EXPECT_THROW(planned.change(larger, [](const residency::Plan&) {}), MemoryLimitError);
}

TEST_F(PlannedModels, AChangeThatFailsKeepsWhatWasReserved) {
  Planned planned(in_tiers(model()), within(20'000), 64, machine_, kVram);
  const std::size_t before = planned.plan().device_cache_slots;
  MemoryStrategy wanted;
  wanted.gpu_reserved = 1000 / 1e9;
  const auto fail = [](const residency::Plan&) { throw std::runtime_error("no"); };
  EXPECT_THROW(planned.change(wanted, fail), std::runtime_error);
  planned.change({}, [](const residency::Plan&) {});
  EXPECT_EQ(planned.plan().device_cache_slots, before);
}

// The parameter that `call` refuses, and what it says.
template <typename Call>
std::string refused(const Call& call) {
  try {
    call();
  } catch (const ParameterError& error) {
    return error.what();
  }
  return "";
}

TEST_F(PlannedModels, WishesOfVramNeedVram) {
  MemoryStrategy experts;
  experts.max_experts = 0;
  MemoryStrategy reserved;
  reserved.gpu_reserved = 0.0;
  Planned on_cpu(model(), within(3000), 64, machine_, std::nullopt);
  ASSERT_TRUE(on_cpu.plan().tiered);
  const Planned on_gpu(in_tiers(model()), within(20'000 + memory::kUncountedBytes), 64, machine_,
                       kVram);
  for (const auto& [strategy, name] :
       {std::pair(experts, "max_experts"), std::pair(reserved, "gpu_reserved")}) {
    on_gpu.check(strategy);
    LoadOptions options = within(3000);
    options.strategy = strategy;
    const std::string at_load =
        refused([&] { Planned(model(), options, 64, machine_, std::nullopt); });
    const std::string later =
        refused([&] { on_cpu.change(strategy, [](const residency::Plan&) { FAIL(); }); });
    for (const std::string& sentence : {at_load, later}) {
      EXPECT_NE(sentence.find(name), std::string::npos) << sentence;
      EXPECT_NE(sentence.find("limits VRAM, and device 'cpu' uses none"), std::string::npos);
    }
  }
}

TEST(CheckMemoryStrategy, TakesWhatIsInRange) {
  const auto with = [](std::int64_t max_experts, double gpu_reserved) {
    MemoryStrategy strategy;
    strategy.max_experts = max_experts;
    strategy.gpu_reserved = gpu_reserved;
    return refused([&] { check_memory_strategy(strategy); });
  };
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  EXPECT_EQ(with(0, 0.0), "");
  EXPECT_EQ(with(kMost, 1e6), "");
  EXPECT_NE(with(-1, 0.0).find("max_experts"), std::string::npos);
  EXPECT_NE(with(kMost + 1, 0.0).find("2147483647"), std::string::npos);
  for (const double bad : {-1e-9, 1.1e6, std::numeric_limits<double>::quiet_NaN()}) {
    EXPECT_NE(with(0, bad).find("gpu_reserved"), std::string::npos) << bad;
  }
}

TEST_F(PlannedModels, TwoEnginesUnderOneLimit) {
  const testing::TinyCheckpoint checkpoint =
      testing::make_tiny_checkpoint(testing::TinyKind::kNvfp4);
  const testing::ScratchFolder folder;
  checkpoint.write(folder.path());
  LoadOptions options;
  options.threads = 1;
  options.max_context = 16;
  options.ram_limit = 1;
  try {
    const Engine too_large(folder.path(), options, machine_);
    FAIL() << "it has no RAM at all";
  } catch (const MemoryLimitError& error) {
    options.ram_limit = error.needed() + memory::kUncountedBytes / 2;
  }
  auto first = std::make_unique<Engine>(folder.path(), options, machine_);
  EXPECT_EQ(account_.committed(boundless()).process,
            first->stats().reserved_bytes + memory::kUncountedBytes);
  EXPECT_THROW(Engine(folder.path(), options, machine_), MemoryLimitError);
  first.reset();
  EXPECT_EQ(account_.committed(boundless()).process, 0u);
  const Engine again(folder.path(), options, machine_);
}

TEST(CheckResult, ResultsThatDoNotFitAreRefusedWithTheNumbers) {
  const memory::MachineMemory machine{32 * kGb, 10 * kGb, 4 * kGb};
  check_result(10 * kGb, 0, machine);
  check_result(2 * kGb, 6 * kGb, machine);
  // Here the process is beyond the limit already.
  check_result(memory::kUncountedBytes, kGb, machine);
  EXPECT_THROW(check_result(10 * kGb + 1, 0, machine), MemoryLimitError);
  EXPECT_THROW(check_result(10 * kGb + 1, 30 * kGb, machine), MemoryLimitError);
  EXPECT_THROW(check_result(memory::kUncountedBytes + 1, kGb, machine), MemoryLimitError);
  try {
    check_result(2 * kGb + 1, 6 * kGb, machine);
    FAIL();
  } catch (const MemoryLimitError& error) {
    EXPECT_EQ(error.needed(), 2 * kGb + 1);
    EXPECT_EQ(error.available(), 2 * kGb);
    EXPECT_NE(std::string(error.what()).find("forward_windows"), std::string::npos);
  }
}

}  // namespace
}  // namespace dsfp4::engine
