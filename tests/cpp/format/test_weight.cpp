#include <cstddef>
#include <cstdint>
#include <string_view>

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
  }
}

}  // namespace
}  // namespace dsfp4::format
