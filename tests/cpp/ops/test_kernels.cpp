// Every kernel table that this CPU can run, held against the plain definitions of the formats.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "format/scalar.h"
#include "ops/cpu/kernels.h"
#include "ops/random_weight.h"

namespace dsfp4::ops::cpu {
namespace {

using testing::kAllFormats;
using testing::random_values;
using testing::random_weight;

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> tables = {&kBaselineKernels};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    tables.push_back(&kAvx2Kernels);
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    tables.push_back(&kAvx512Kernels);
  }
  return tables;
}

class KernelTable : public ::testing::TestWithParam<const Kernels*> {};

TEST_P(KernelTable, DecodesEveryFormatLikeItsDefinition) {
  for (const format::WeightFormat format : kAllFormats) {
    const auto matrix = random_weight(format, 131, 288, 5);
    const format::WeightView weight = matrix.view();
    std::vector<float> expected(288);
    std::vector<float> actual(288);
    for (std::int64_t row = 0; row < weight.rows; ++row) {
      format::decode_row(weight, row, expected);
      GetParam()->decode_row(weight, row, actual.data());
      for (std::size_t i = 0; i < actual.size(); ++i) {
        ASSERT_EQ(actual[i] * global_scale(weight), expected[i])
            << format::weight_format_name(format) << " row " << row << " col " << i;
      }
    }
  }
}

TEST_P(KernelTable, DecodesEveryCode) {
  for (int scale = 0; scale < 256; ++scale) {
    std::vector<std::byte> data(256);
    for (int code = 0; code < 256; ++code) data[static_cast<std::size_t>(code)] = std::byte(code);
    for (const auto format : {format::WeightFormat::kNvfp4, format::WeightFormat::kMxfp4}) {
      const std::vector<std::byte> scales(32, std::byte(scale));
      const format::WeightView weight{format, 1, 512, data.data(), scales.data(), 1.0f};
      std::vector<float> expected(512);
      std::vector<float> actual(512);
      format::decode_row(weight, 0, expected);
      GetParam()->decode_row(weight, 0, actual.data());
      for (std::size_t i = 0; i < actual.size(); ++i) {
        if (std::isnan(expected[i])) {
          ASSERT_TRUE(std::isnan(actual[i]));
        } else {
          ASSERT_EQ(actual[i], expected[i]) << "scale " << scale << " value " << i;
        }
      }
    }
  }
}

TEST_P(KernelTable, WeightsMayStartAtAnyByte) {
  for (const format::WeightFormat format : kAllFormats) {
    const auto matrix = random_weight(format, 3, 64, 6);
    format::WeightView moved = matrix.view();
    std::vector<std::byte> data(matrix.data.size() + 1);
    std::vector<std::byte> scales(matrix.scales.size() + 1);
    std::memcpy(data.data() + 1, matrix.data.data(), matrix.data.size());
    if (!matrix.scales.empty()) {
      std::memcpy(scales.data() + 1, matrix.scales.data(), matrix.scales.size());
    }
    moved.data = data.data() + 1;
    moved.scales = scales.data() + 1;
    std::vector<float> expected(64);
    std::vector<float> actual(64);
    for (std::int64_t row = 0; row < 3; ++row) {
      GetParam()->decode_row(matrix.view(), row, expected.data());
      GetParam()->decode_row(moved, row, actual.data());
      ASSERT_EQ(actual, expected) << format::weight_format_name(format);
    }
  }
}

TEST_P(KernelTable, RoundsToBf16LikeTheFormat) {
  auto x = random_values(1000, 9);
  x.push_back(std::numeric_limits<float>::infinity());
  x.push_back(-std::numeric_limits<float>::infinity());
  x.push_back(std::numeric_limits<float>::max());
  x.push_back(std::numeric_limits<float>::denorm_min());
  x.push_back(-0.0f);
  x.push_back(std::nanf(""));
  std::vector<float> y(x.size());
  GetParam()->round_to_bf16(x.data(), y.data(), static_cast<std::int64_t>(x.size()));
  for (std::size_t i = 0; i + 1 < x.size(); ++i) {
    EXPECT_EQ(y[i], format::bf16_to_float(format::float_to_bf16(x[i]))) << x[i];
  }
  EXPECT_TRUE(std::isnan(y.back()));
}

INSTANTIATE_TEST_SUITE_P(Isa, KernelTable, ::testing::ValuesIn(runnable()),
                         [](const auto& table) { return std::string(table.param->isa); });

}  // namespace
}  // namespace dsfp4::ops::cpu
