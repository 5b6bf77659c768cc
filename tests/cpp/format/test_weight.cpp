#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

#include "format/weight.h"

namespace dsfp4::format {
namespace {

struct Sizes {
  WeightFormat format;
  std::string_view name;
  std::size_t data, scales;  // of a [130, 160] matrix
};

// 130 x 160 is 20800 values; FP8 has 2 x 2 tiles of one F32 each.
constexpr Sizes kSizes[] = {{WeightFormat::kF32, "f32", 83200, 0},
                            {WeightFormat::kBF16, "bf16", 41600, 0},
                            {WeightFormat::kFp8Block, "fp8", 20800, 16},
                            {WeightFormat::kNvfp4, "nvfp4", 10400, 1300},
                            {WeightFormat::kMxfp4, "mxfp4", 10400, 650}};

TEST(Weight, NamesAndSizes) {
  for (const Sizes& sizes : kSizes) {
    EXPECT_EQ(weight_format_name(sizes.format), sizes.name);
    EXPECT_EQ(data_bytes(sizes.format, 130, 160), sizes.data) << sizes.name;
    EXPECT_EQ(scale_bytes(sizes.format, 130, 160), sizes.scales) << sizes.name;
    EXPECT_EQ(stored_bytes(sizes.format, 130, 160), sizes.data + sizes.scales) << sizes.name;
  }
}

TEST(Weight, BadScalesAreFoundWhereverTheyAre) {
  std::vector<std::byte> scales;
  WeightView weight;
  weight.rows = 256;
  weight.cols = 512;
  const auto find = [&](WeightFormat format) {
    weight.format = format;
    scales.assign(scale_bytes(format, weight.rows, weight.cols), std::byte{0x7e});
    weight.scales = scales.data();
    EXPECT_EQ(find_bad_scale(weight), std::nullopt);
    return scales.size();
  };
  for (const WeightFormat format : {WeightFormat::kNvfp4, WeightFormat::kMxfp4}) {
    const bool e4m3 = format == WeightFormat::kNvfp4;
    const std::size_t size = find(format);
    for (const std::size_t at : {std::size_t{0}, std::size_t{4095}, size / 2, size - 1}) {
      for (int code = 0; code < 256; ++code) {
        const bool bad = e4m3 ? code == 0x7f || code == 0xff : code == 0xff;
        scales[at] = static_cast<std::byte>(code);
        ASSERT_EQ(find_bad_scale(weight), bad ? std::optional(at) : std::nullopt) << code;
      }
      scales[at] = std::byte{0};
    }
  }
  find(WeightFormat::kFp8Block);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  for (const float bad : {kInfinity, -kInfinity, kNan, -kNan}) {
    std::memcpy(scales.data() + 20, &bad, sizeof(bad));
    EXPECT_EQ(find_bad_scale(weight), 20u);
  }
  for (const WeightFormat plain : {WeightFormat::kF32, WeightFormat::kBF16}) {
    weight = {plain, 256, 512, nullptr, nullptr, 1.0f};
    EXPECT_EQ(find_bad_scale(weight), std::nullopt);
  }
}

}  // namespace
}  // namespace dsfp4::format
