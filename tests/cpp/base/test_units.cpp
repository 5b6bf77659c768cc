#include <gtest/gtest.h>

#include "base/units.h"

namespace dsfp4 {
namespace {

TEST(Units, GigabytesAreOfPowersOfTenAndRounded) {
  EXPECT_EQ(gigabytes(0), "0.000 GB");
  EXPECT_EQ(gigabytes(1'234'567'890), "1.235 GB");
  EXPECT_EQ(gigabytes(400'000'000'000), "400.000 GB");
}

}  // namespace
}  // namespace dsfp4
