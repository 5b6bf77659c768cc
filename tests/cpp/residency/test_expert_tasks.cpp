#include <vector>

#include <gtest/gtest.h>

#include "residency/expert_tasks.h"

namespace dsfp4::residency {
namespace {

TEST(ExpertTasks, GroupsPairsByExpertInAscendingOrder) {
  const std::vector<std::int32_t> used = {5, 2, 2, 7, 5, 2};
  std::vector<std::int32_t> pairs(used.size());
  const auto chosen = group_by_expert(used, pairs);
  ASSERT_EQ(chosen.size(), 3U);
  EXPECT_EQ(chosen[0].expert, 2);
  EXPECT_EQ(std::vector(chosen[0].pairs.begin(), chosen[0].pairs.end()),
            (std::vector<std::int32_t>{1, 2, 5}));
  EXPECT_EQ(chosen[1].expert, 5);
  EXPECT_EQ(std::vector(chosen[1].pairs.begin(), chosen[1].pairs.end()),
            (std::vector<std::int32_t>{0, 4}));
  EXPECT_EQ(chosen[2].expert, 7);
  EXPECT_EQ(chosen[2].pairs.size(), 1U);
}

TEST(ExpertTasks, NoPairsGiveNoExperts) { EXPECT_TRUE(group_by_expert({}, {}).empty()); }

}  // namespace
}  // namespace dsfp4::residency
