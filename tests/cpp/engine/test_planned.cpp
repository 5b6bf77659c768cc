// Models of one process share its RAM; and what a load may take is decided before it takes it.
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include <gtest/gtest.h>

#include "checkpoint/tiny_checkpoint.h"
#include "dsfp4/error.h"
#include "engine/engine.h"
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
