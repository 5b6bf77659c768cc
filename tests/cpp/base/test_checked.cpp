#include <cstdint>
#include <limits>

#include <gtest/gtest.h>

#include "base/checked.h"

namespace dsfp4 {
namespace {

TEST(Checked, ProductsAndSumsThatFitAreExact) {
  EXPECT_EQ(checked_mul<std::uint64_t>(1u << 31, 1u << 31), std::uint64_t{1} << 62);
  EXPECT_EQ(checked_add<std::int64_t>(-5, 3), -2);
}

TEST(Checked, OverflowIsNothing) {
  constexpr auto kMax = std::numeric_limits<std::uint64_t>::max();
  EXPECT_FALSE(checked_mul<std::uint64_t>(kMax, 2).has_value());
  EXPECT_FALSE(checked_add<std::uint64_t>(kMax, 1).has_value());
  EXPECT_FALSE(checked_mul<std::int64_t>(std::numeric_limits<std::int64_t>::min(), -1));
}

TEST(Checked, CeilDiv) {
  EXPECT_EQ(ceil_div(0, 4), 0);
  EXPECT_EQ(ceil_div(4, 4), 1);
  EXPECT_EQ(ceil_div(5, 4), 2);
}

}  // namespace
}  // namespace dsfp4
