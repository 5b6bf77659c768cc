// A few values by hand; tests/python/test_formats.py goes over all codes with ml_dtypes.
#include <cmath>
#include <limits>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "format/scalar.h"

namespace dsfp4::format {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
const float kNan = std::numeric_limits<float>::quiet_NaN();

TEST(Scalar, E2m1TiesGoToTheEvenCodeAndTheLargestSaturates) {
  const std::pair<float, float> rounded[] = {{0.25f, 0.0f}, {0.75f, 1.0f}, {1.25f, 1.0f},
                                             {1.75f, 2.0f}, {2.5f, 2.0f},  {3.5f, 4.0f},
                                             {5.0f, 4.0f},  {5.01f, 6.0f}, {1e30f, 6.0f}};
  for (const auto& [value, expected] : rounded) {
    EXPECT_EQ(e2m1_to_float(float_to_e2m1(value)), expected) << value;
    EXPECT_EQ(e2m1_to_float(float_to_e2m1(-value)), -expected) << -value;
  }
  EXPECT_EQ(float_to_e2m1(-0.0f), 8);
  EXPECT_THROW(float_to_e2m1(kNan), ParameterError);
  EXPECT_THROW(float_to_e2m1(kInf), ParameterError);
}

TEST(Scalar, E4m3Landmarks) {
  EXPECT_EQ(float_to_e4m3(448.0f), 0x7e);
  EXPECT_EQ(float_to_e4m3(1e9f), 0x7e);
  EXPECT_EQ(float_to_e4m3(-kInf), 0xfe);
  EXPECT_EQ(float_to_e4m3(0x1.0p-9f), 1);
  EXPECT_EQ(float_to_e4m3(0x1.0p-10f), 0);  // a tie, to even
  EXPECT_EQ(float_to_e4m3(1.0f), 0x38);
  EXPECT_EQ(e4m3_to_float(0x08), 0x1.0p-6f);
  EXPECT_TRUE(std::isnan(e4m3_to_float(0x7f)));
  EXPECT_EQ(float_to_e4m3(kNan) & 0x7f, 0x7f);
}

TEST(Scalar, E8m0IsAPowerOfTwo) {
  EXPECT_EQ(e8m0_to_float(127), 1.0f);
  EXPECT_EQ(e8m0_to_float(0), 0x1.0p-127f);
  EXPECT_EQ(e8m0_to_float(254), 0x1.0p127f);
  EXPECT_TRUE(std::isnan(e8m0_to_float(255)));
}

TEST(Scalar, MxScaleHoldsTheLargestValue) {
  EXPECT_EQ(mx_scale_code(6.0f), 127);
  EXPECT_EQ(mx_scale_code(std::nextafter(6.0f, 7.0f)), 128);
  EXPECT_EQ(mx_scale_code(3.0f), 126);
  EXPECT_EQ(mx_scale_code(0.0f), 127);
  EXPECT_EQ(mx_scale_code(std::numeric_limits<float>::denorm_min()), 0);
  EXPECT_EQ(mx_scale_code(std::numeric_limits<float>::max()), 253);
  EXPECT_THROW(mx_scale_code(-1.0f), ParameterError);
  EXPECT_THROW(mx_scale_code(kInf), ParameterError);
}

TEST(Scalar, Bf16RoundsToNearestEven) {
  EXPECT_EQ(float_to_bf16(1.0f), 0x3f80);
  EXPECT_EQ(float_to_bf16(1.0f + 0x1.0p-8f), 0x3f80);  // a tie, to even
  EXPECT_EQ(float_to_bf16(1.0f + 0x1.8p-7f), 0x3f82);
  EXPECT_EQ(float_to_bf16(std::numeric_limits<float>::max()), 0x7f80);
  EXPECT_TRUE(std::isnan(bf16_to_float(float_to_bf16(kNan))));
}

}  // namespace
}  // namespace dsfp4::format
