#include <cmath>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "format/block.h"
#include "format/scalar.h"

namespace dsfp4::format {
namespace {

std::vector<float> ramp(std::size_t count) {
  std::vector<float> values(count);
  for (std::size_t i = 0; i < count; ++i) {
    values[i] = static_cast<float>(i % 37) / 7.0f - 2.5f;
  }
  return values;
}

TEST(Block, SizesOfEveryFormat) {
  EXPECT_EQ(data_bytes(WeightFormat::kNvfp4, 3, 64), 96u);
  EXPECT_EQ(scale_bytes(WeightFormat::kNvfp4, 3, 64), 12u);
  EXPECT_EQ(scale_bytes(WeightFormat::kMxfp4, 3, 64), 6u);
  EXPECT_EQ(data_bytes(WeightFormat::kFp8Block, 129, 130), 129u * 130u);
  EXPECT_EQ(scale_bytes(WeightFormat::kFp8Block, 129, 130), 16u);
  EXPECT_EQ(data_bytes(WeightFormat::kBF16, 3, 5), 30u);
  EXPECT_EQ(scale_bytes(WeightFormat::kBF16, 3, 5), 0u);
}

TEST(Block, Nvfp4ByHand) {
  std::vector<float> values(16, 0.0f);
  values[0] = 12.0f;
  values[1] = -3.0f;
  values[15] = 1.0f;
  // scale = 12 / 6 = 2 with a global scale of 1; codes of 6, -1.5 and .5
  const EncodedMatrix matrix = encode_nvfp4(values, 1, 16, 1.0f);
  EXPECT_EQ(matrix.scales[0], std::byte{float_to_e4m3(2.0f)});
  EXPECT_EQ(matrix.data[0], std::byte{0xb7});
  EXPECT_EQ(matrix.data[7], std::byte{0x10});
  EXPECT_EQ(decode(matrix.view()), values);
}

TEST(Block, RoundTripErrorIsBoundedByHalfAStep) {
  const std::vector<float> values = ramp(4 * 96);
  const auto check = [&](const EncodedMatrix& matrix, double limit) {
    const std::vector<float> decoded = decode(matrix.view());
    for (std::size_t i = 0; i < values.size(); ++i) {
      EXPECT_NEAR(decoded[i], values[i], limit) << weight_format_name(matrix.format) << i;
    }
  };
  check(encode_nvfp4(values, 4, 96, nvfp4_global_scale(2.65f)), 0.5);  // step 2 at 4..6, scaled
  check(encode_mxfp4(values, 4, 96), 0.6);
  check(encode_fp8_block(values, 4, 96), 0.1);
  check(encode_bf16(values, 4, 96), 0.01);
}

TEST(Block, ZeroTensorsDecodeToZero) {
  const std::vector<float> zeros(64, 0.0f);
  EXPECT_EQ(nvfp4_global_scale(0.0f), 1.0f);
  EXPECT_EQ(decode(encode_nvfp4(zeros, 2, 32, 1.0f).view()), zeros);
  EXPECT_EQ(decode(encode_mxfp4(zeros, 2, 32).view()), zeros);
  EXPECT_EQ(encode_mxfp4(zeros, 2, 32).scales[0], std::byte{127});
  EXPECT_EQ(decode(encode_fp8_block(zeros, 2, 32).view()), zeros);
}

TEST(Block, ExtremesStayFinite) {
  constexpr float kMax = std::numeric_limits<float>::max();
  const std::vector<float> huge(32, kMax);
  // 4 * 2^126 would be nearer, and is infinite.
  for (const float v : decode(encode_mxfp4(huge, 1, 32).view())) EXPECT_EQ(v, 0x1.8p127f);
  for (const float v : decode(encode_fp8_block(huge, 1, 32).view())) EXPECT_EQ(v, kMax);
  // Far over what the given global scale can hold: saturates.
  for (const float v : decode(encode_nvfp4(huge, 1, 32, 1.0f).view())) EXPECT_EQ(v, 2688.0f);
}

TEST(Block, SubnormalsAreNotLostWhereTheScaleUnderflows) {
  constexpr float kMin = std::numeric_limits<float>::denorm_min();
  const std::vector<float> tiny(32, kMin);
  // The quotients amax / 2688 and amax / 448 are 0 as floats.
  EXPECT_EQ(nvfp4_global_scale(kMin), kMin);
  EXPECT_EQ(decode(encode_nvfp4(tiny, 1, 32, kMin).view()), tiny);
  EXPECT_EQ(decode(encode_fp8_block(tiny, 1, 32).view()), tiny);
  // The smallest MX scale is 2^-127.
  EXPECT_EQ(decode(encode_mxfp4(tiny, 1, 32).view()), std::vector<float>(32, 0.0f));
}

// A quotient next to the middle of two codes, rounded to float first, can become the middle.
TEST(Block, QuotientsRoundOnce) {
  std::vector<float> values(16, 0.0f);
  values[0] = 2688.0f;
  values[1] = 112.0f * 1.0000001f;  // just over a quarter of the scale
  values[2] = 112.0f;
  values[3] = 112.0f * 0.9999999f;
  const EncodedMatrix fp4 = encode_nvfp4(values, 1, 16, 1.0f);
  EXPECT_EQ(fp4.scales[0], std::byte{0x7e});
  EXPECT_EQ(fp4.data[0], std::byte{0x17});
  EXPECT_EQ(fp4.data[1], std::byte{0x00});
  // The double next to the tie of 1 and 1.125 is the tie as a float.
  EXPECT_EQ(double_to_e4m3(1.0625), 0x38);
  EXPECT_EQ(double_to_e4m3(std::nextafter(1.0625, 2.0)), 0x39);
  EXPECT_EQ(double_to_e4m3(std::nextafter(1.1875, 1.0)), 0x39);
  EXPECT_EQ(double_to_e4m3(1.1875), 0x3a);
}

TEST(Block, BadArgumentsNameTheParameter) {
  const auto parameter = [](const auto& call) -> std::string {
    try {
      call();
    } catch (const ParameterError& error) {
      return error.parameter();
    }
    return "";
  };
  std::vector<float> values(32, 1.0f);
  EXPECT_EQ(parameter([&] { encode_nvfp4(values, 4, 8, 1.0f); }), "cols");
  EXPECT_EQ(parameter([&] { encode_mxfp4(values, 2, 16); }), "cols");
  EXPECT_EQ(parameter([&] { encode_nvfp4(values, 3, 16, 1.0f); }), "values");
  EXPECT_EQ(parameter([&] { encode_fp8_block(values, -1, -32); }), "values");
  EXPECT_EQ(parameter([&] { encode_nvfp4(values, 2, 16, 0.0f); }), "global_scale");
  EXPECT_EQ(parameter([&] { encode_nvfp4(values, 2, 16, std::nanf("")); }), "global_scale");
  EXPECT_EQ(parameter([&] { nvfp4_global_scale(std::nanf("")); }), "amax");
  values[17] = std::nanf("");
  EXPECT_EQ(parameter([&] { encode_nvfp4(values, 2, 16, 1.0f); }), "values");
  EXPECT_EQ(parameter([&] { encode_fp8_block(values, 2, 16); }), "values");
  std::vector<float> out(7);
  const EncodedMatrix matrix = encode_bf16(ramp(16), 2, 8);
  EXPECT_EQ(parameter([&] { decode_row(matrix.view(), 0, out); }), "out");
}

}  // namespace
}  // namespace dsfp4::format
