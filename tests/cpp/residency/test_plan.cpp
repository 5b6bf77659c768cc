#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "residency/plan.h"

namespace dsfp4::residency {
namespace {

const RamNeeds kNeeds{1000, 10'000, 120, 100, 4};

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

}  // namespace
}  // namespace dsfp4::residency
