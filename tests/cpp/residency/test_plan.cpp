#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "residency/plan.h"

namespace dsfp4::residency {
namespace {

const RamNeeds kNeeds{1000, 10'000, 120, 100, 4, {}, 0};

TEST(Plan, LoadsEverythingThatFits) {
  const RamPlan plan = plan_ram(kNeeds, {}, 11'000);
  EXPECT_FALSE(plan.tiered);
  EXPECT_EQ(plan.total_bytes, 11'000u);
}

TEST(Plan, CachesWhatIsLeft) {
  const RamPlan plan = plan_ram(kNeeds, {}, 10'999);
  EXPECT_TRUE(plan.tiered);
  EXPECT_EQ(plan.slots, 9'999u / 120u);
  EXPECT_EQ(plan.slots - plan.cache_slots, 8u);
  EXPECT_LE(plan.total_bytes, 10'999u);
}

TEST(Plan, ObeysWishes) {
  const RamPlan plan = plan_ram(kNeeds, {{6000}, {240}}, 1'000'000);
  EXPECT_TRUE(plan.tiered);
  EXPECT_EQ(plan.cache_slots, 50u);
  EXPECT_EQ(plan.slots, 52u);
  EXPECT_FALSE(plan_ram(kNeeds, {{12'000}, {}}, 1'000'000).tiered);
  EXPECT_EQ(plan_ram(kNeeds, {{0}, {}}, 1'000'000).cache_slots, 0u);
}

TEST(Plan, RefusesBelowTheFloorWithTheNumber) {
  EXPECT_NO_THROW(plan_ram(kNeeds, {}, 1000 + 8 * 120));
  try {
    plan_ram(kNeeds, {}, 1000 + 8 * 120 - 1);
    FAIL();
  } catch (const MemoryLimitError& error) {
    EXPECT_EQ(error.needed(), 1960u);
    EXPECT_EQ(error.available(), 1959u);
  }
  EXPECT_THROW(plan_ram(kNeeds, {{6000}, {}}, 5000), MemoryLimitError);
  EXPECT_THROW(plan_ram(kNeeds, {{600}, {100}}, 1'000'000), ParameterError);
}

// Ten layers of 80 bytes each, and 200 that always stay.
RamNeeds with_layers() {
  RamNeeds needs = kNeeds;
  needs.layer_bytes.assign(10, 80);
  needs.layer_buffer_bytes = 170;
  return needs;
}

TEST(Plan, StreamsAsFewLayersAsNecessaryEvenlySpread) {
  const std::uint64_t whole = 1000 + 8 * 120;
  EXPECT_EQ(plan_ram(with_layers(), {}, whole).streamed_layers(), 0u);
  const RamPlan one_byte_short = plan_ram(with_layers(), {}, whole - 1);
  EXPECT_EQ(one_byte_short.streamed_layers(), 3u);  // two save less than the buffers take
  EXPECT_TRUE(one_byte_short.tiered);
  EXPECT_EQ(one_byte_short.total_bytes, whole - 3 * 80 + 170);
  const RamPlan half = plan_ram(with_layers(), {}, whole - 5 * 80 + 170);
  EXPECT_EQ(half.streamed,
            (std::vector<bool>{false, true, false, true, false, true, false, true, false, true}));
}

TEST(Plan, TheFloorIsWithEveryLayerStreamed) {
  const std::uint64_t floor = 1000 + 8 * 120 - 10 * 80 + 170;
  EXPECT_EQ(plan_ram(with_layers(), {}, floor).streamed_layers(), 10u);
  try {
    plan_ram(with_layers(), {}, floor - 1);
    FAIL();
  } catch (const MemoryLimitError& error) {
    EXPECT_EQ(error.needed(), floor);
  }
}

TEST(Plan, AModelWithoutExpertsIsStreamedToo) {
  RamNeeds needs = with_layers();
  needs.expert_bytes = needs.slot_bytes = needs.experts = needs.experts_per_token = 0;
  EXPECT_EQ(plan_ram(needs, {}, 1000).streamed_layers(), 0u);
  const RamPlan plan = plan_ram(needs, {}, 500);
  EXPECT_FALSE(plan.tiered);
  EXPECT_EQ(plan.streamed_layers(), 9u);
  EXPECT_EQ(plan.total_bytes, 1000u - 9 * 80 + 170);
}

}  // namespace
}  // namespace dsfp4::residency
