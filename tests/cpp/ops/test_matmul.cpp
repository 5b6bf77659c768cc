// Every matrix product of every instruction set under test: against the decoded
// weights in double precision, at odd sizes and byte offsets, in any company, split anywhere.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "format/scalar.h"
#include "ops/cpu/isa.h"
#include "ops/cpu/scratch.h"
#include "ops/random_weight.h"
#include "ops/under_test.h"

namespace dsfp4::ops::cpu {
namespace {

using format::WeightFormat;
using testing::kAllFormats;
using testing::random_values;
using testing::random_weight;
using testing::relative_error;

std::int64_t group_of(WeightFormat format) {
  if (format == WeightFormat::kNvfp4) return format::kNvfp4Group;
  return format == WeightFormat::kMxfp4 ? format::kMxfp4Group : 1;
}

// A weight whose bytes end where its memory ends and begin `offset` bytes into it.
class MovedWeight {
 public:
  MovedWeight(const format::EncodedMatrix& from, std::size_t offset)
      : data_(offset + from.data.size()), scales_(offset + from.scales.size()), view_(from.view()) {
    std::copy(from.data.begin(), from.data.end(), data_.begin() + static_cast<long>(offset));
    std::copy(from.scales.begin(), from.scales.end(), scales_.begin() + static_cast<long>(offset));
    view_.data = data_.data() + offset;
    view_.scales = scales_.data() + offset;
  }
  const format::WeightView& view() const { return view_; }

 private:
  std::vector<std::byte> data_, scales_;
  format::WeightView view_;
};

struct PackedRows {
  PackedRows(const Matmul& matmul, const std::vector<float>& x, std::int64_t tokens,
             std::int64_t cols, bool round)
      : stride(matmul.packed_bytes(cols)) {
    data = memory.get(std::max<std::size_t>(1, stride * static_cast<std::size_t>(tokens)));
    std::memset(data, 0xff, stride * static_cast<std::size_t>(tokens));  // NaN where not packed
    for (std::int64_t t = 0; t < tokens; ++t) {
      matmul.pack(x.data() + t * cols, cols, round, data + static_cast<std::size_t>(t) * stride);
    }
  }
  Scratch memory;
  std::byte* data;
  std::size_t stride;
};

std::vector<float> multiply(const Matmul& matmul, const format::WeightView& weight,
                            const std::vector<float>& x, std::int64_t tokens, bool round) {
  const PackedRows packed(matmul, x, tokens, weight.cols, round);
  std::vector<float> y(static_cast<std::size_t>(tokens * weight.rows), -777.0f);
  Scratch scratch;
  matmul.multiply({.weight = &weight,
                   .row_begin = 0,
                   .row_end = weight.rows,
                   .x = packed.data,
                   .x_stride = packed.stride,
                   .y = y.data(),
                   .y_stride = weight.rows,
                   .tokens = tokens},
                  scratch.get(matmul.scratch_bytes));
  return y;
}

std::vector<float> expected_product(const format::WeightView& weight, const std::vector<float>& x,
                                    std::int64_t tokens, bool round) {
  const std::vector<float> w = format::decode(weight);
  std::vector<float> y;
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t r = 0; r < weight.rows; ++r) {
      double sum = 0.0;
      for (std::int64_t i = 0; i < weight.cols; ++i) {
        const float v = x[static_cast<std::size_t>(t * weight.cols + i)];
        const float in = round ? format::bf16_to_float(format::float_to_bf16(v)) : v;
        sum += static_cast<double>(in) * w[static_cast<std::size_t>(r * weight.cols + i)];
      }
      y.push_back(static_cast<float>(sum));
    }
  }
  return y;
}

class MatmulOf : public ::testing::TestWithParam<const Isa*> {
 protected:
  struct Case {
    const Matmul* matmul;
    WeightFormat format;
    bool round;
  };
  /// Of both phases, each once.
  static std::vector<const Matmul*> rounded(WeightFormat format) {
    const Matmul* decode = &GetParam()->matmul(format, Inputs::kBf16, Phase::kDecode);
    const Matmul* prefill = &GetParam()->matmul(format, Inputs::kBf16, Phase::kPrefill);
    return decode == prefill ? std::vector{decode} : std::vector{decode, prefill};
  }
  static std::vector<Case> cases() {
    std::vector<Case> all;
    for (const WeightFormat format : kAllFormats) {
      all.push_back({&GetParam()->matmul(format, Inputs::kF32, Phase::kDecode), format, false});
      for (const Matmul* matmul : rounded(format)) all.push_back({matmul, format, true});
    }
    return all;
  }
  static std::string label(const Case& c) {
    return std::string(c.matmul->name) + " " + std::string(format::weight_format_name(c.format)) +
           (c.round ? "" : " exact");
  }
};

TEST_P(MatmulOf, AgreesWithDecodedWeightsAtOddSizes) {
  struct Size {
    std::int64_t rows, groups, tokens;
  };
  const Size sizes[] = {{1, 1, 1},    {3, 2, 2},    {5, 3, 3},   {7, 5, 4},
                        {33, 7, 5},   {66, 8, 7},   {2, 9, 13},  {35, 37, 6},
                        {130, 65, 9}, {9, 70, 100}, {40, 129, 3}};
  for (const Case& c : cases()) {
    std::size_t offset = 1;
    for (const Size& size : sizes) {
      const std::int64_t cols = size.groups * group_of(c.format);
      const auto matrix = random_weight(c.format, size.rows, cols, 11);
      const MovedWeight weight(matrix, offset++ % 7);
      const auto x = random_values(size.tokens * cols, 12);
      const auto actual = multiply(*c.matmul, weight.view(), x, size.tokens, c.round);
      const auto rounded = expected_product(weight.view(), x, size.tokens, c.round);
      const auto exact = expected_product(weight.view(), x, size.tokens, false);
      // Either the sum of rounded inputs or, where integers carry more than BF16, a better one.
      const double error = std::min(relative_error(actual, rounded), relative_error(actual, exact));
      EXPECT_LT(error, c.round ? 3e-5 : 2e-6)
          << label(c) << " " << size.rows << " x " << cols << ", " << size.tokens << " tokens";
    }
  }
}

TEST_P(MatmulOf, LosesNoMoreThanBf16Activations) {
  for (const Case& c : cases()) {
    const std::int64_t cols = 1152;
    const auto matrix = random_weight(c.format, 64, cols, 21);
    // Activations with outliers, as models have them: one in 64 is up to 300 times as large.
    auto x = random_values(4 * cols, 22);
    for (std::size_t i = 0; i < x.size(); i += 64) x[i] *= static_cast<float>(1 + i % 300);
    const auto exact = expected_product(matrix.view(), x, 4, false);
    const auto rounded = expected_product(matrix.view(), x, 4, true);
    const auto actual = multiply(*c.matmul, matrix.view(), x, 4, c.round);
    EXPECT_LE(relative_error(actual, exact), 1.001 * relative_error(rounded, exact)) << label(c);
  }
}

TEST_P(MatmulOf, CompanyAndSplitsChangeNothing) {
  for (const Case& c : cases()) {
    const std::int64_t rows = 70;
    const std::int64_t cols = 2 * 1024 + 3 * group_of(c.format);
    const std::int64_t tokens = 103;
    const auto matrix = random_weight(c.format, rows, cols, 31);
    const format::WeightView weight = matrix.view();
    const auto x = random_values(tokens * cols, 32);
    const auto together = multiply(*c.matmul, weight, x, tokens, c.round);
    const PackedRows packed(*c.matmul, x, tokens, cols, c.round);
    Scratch scratch;
    std::int64_t count = 1;
    for (std::int64_t t = 0; t < tokens; t += count, count = count % 9 + 1) {
      count = std::min(count, tokens - t);
      // Tokens backwards through both indices, rows in two uneven pieces.
      std::vector<std::int32_t> index;
      for (std::int64_t i = count; i > 0; --i)
        index.push_back(static_cast<std::int32_t>(t + i - 1));
      std::vector<float> y(together.size(), -777.0f);
      for (const auto& [begin, end] : {std::pair<std::int64_t, std::int64_t>{0, 37}, {37, rows}}) {
        c.matmul->multiply({.weight = &weight,
                            .row_begin = begin,
                            .row_end = end,
                            .x = packed.data,
                            .x_stride = packed.stride,
                            .x_index = index.data(),
                            .y = y.data() + begin,
                            .y_stride = rows,
                            .y_index = index.data(),
                            .tokens = count},
                           scratch.get(c.matmul->scratch_bytes));
      }
      for (std::int64_t i = 0; i < tokens * rows; ++i) {
        const bool mine = i / rows >= t && i / rows < t + count;
        const auto at = static_cast<std::size_t>(i);
        ASSERT_EQ(y[at], mine ? together[at] : -777.0f)
            << label(c) << ": token " << i / rows << " of " << count << ", row " << i % rows;
      }
    }
  }
}

// One column is not zero: the result is the value of one code, whatever the scale's code.
TEST_P(MatmulOf, EveryCodeAndScaleHasItsValue) {
  for (const WeightFormat format : {WeightFormat::kNvfp4, WeightFormat::kMxfp4}) {
    const std::int64_t group = group_of(format);
    for (int scale = 0; scale < 256; ++scale) {
      const bool tiny = format == WeightFormat::kMxfp4 && scale < 3;  // BF16 products end there
      const bool huge = format == WeightFormat::kMxfp4 && scale > 200 && scale < 255;
      if (tiny || huge) continue;
      // Row r: code r in column r of each group.
      std::vector<std::byte> data(static_cast<std::size_t>(16 * group / 2));
      for (std::size_t r = 0; r < 16; ++r) {
        data[(r * static_cast<std::size_t>(group) + r) / 2] = std::byte(r << (r % 2 * 4));
      }
      const std::vector<std::byte> scales(16, std::byte(scale));
      const format::WeightView weight{format, 16, group, data.data(), scales.data(), 1.0f};
      const std::vector<float> w = format::decode(weight);
      const std::vector<float> x(static_cast<std::size_t>(group), 1.0f);
      for (const Matmul* matmul : rounded(format)) {
        const auto y = multiply(*matmul, weight, x, 1, true);
        for (std::size_t r = 0; r < 16; ++r) {
          const float expected = w[r * static_cast<std::size_t>(group) + r];
          if (std::isnan(expected)) {
            ASSERT_TRUE(std::isnan(y[r]));
          } else {
            ASSERT_NEAR(y[r], expected, 1e-6 * std::fabs(expected))
                << matmul->name << " " << format::weight_format_name(format) << " scale " << scale
                << " code " << r;
          }
        }
      }
    }
  }
}

// One block of a long row has the scale under test and the only activation that is not zero.
TEST_P(MatmulOf, EveryScaleHasItsValueInEveryBlock) {
  constexpr std::int64_t kCols = 2 * 128 + 96;
  for (const WeightFormat format : {WeightFormat::kNvfp4, WeightFormat::kMxfp4}) {
    const std::int64_t blocks = kCols / group_of(format);
    const std::vector<std::byte> data(3 * kCols / 2, std::byte{0x33});  // 1.5
    const std::vector<std::byte> one(3 * static_cast<std::size_t>(blocks),
                                     std::byte(format == WeightFormat::kNvfp4 ? 0x38 : 127));
    for (int scale = 0; scale < 256; ++scale) {
      if (format == WeightFormat::kMxfp4 && (scale < 3 || scale > 200) && scale != 255) continue;
      const std::int64_t block = scale % blocks;
      auto scales = one;
      scales[static_cast<std::size_t>(blocks + block)] = std::byte(scale);
      const format::WeightView weight{format, 3, kCols, data.data(), scales.data(), 1.0f};
      std::vector<float> x(7 * kCols);
      for (std::int64_t t = 0; t < 7; ++t) {
        x[static_cast<std::size_t>(t * kCols + block * group_of(format) + scale % 16)] = 1.0f;
      }
      const float expected =
          format::decode(weight)[static_cast<std::size_t>(kCols + block * group_of(format))];
      for (const Matmul* matmul : rounded(format)) {
        for (const std::int64_t tokens : {1, 2, 7}) {
          const auto y = multiply(*matmul, weight, x, tokens, true);
          for (std::size_t i = 0; i < y.size(); ++i) {
            const float value = i % 3 == 1 ? expected : 1.5f;
            if (std::isnan(value)) {
              ASSERT_TRUE(std::isnan(y[i])) << matmul->name << " scale " << scale;
            } else {
              ASSERT_NEAR(y[i], value, 1e-6 * std::fabs(value))
                  << matmul->name << " scale " << scale << " token " << i / 3;
            }
          }
        }
      }
    }
  }
}

TEST_P(MatmulOf, EveryFp8CodeHasItsValue) {
  std::vector<std::byte> data(256);
  for (std::size_t i = 0; i < 256; ++i) data[i] = std::byte(i);
  const std::vector<float> one = {1.0f};
  std::vector<std::byte> scales(2 * sizeof(float));
  const float factors[2] = {0.25f, 3.0f};
  std::memcpy(scales.data(), factors, sizeof(factors));
  const format::WeightView weight{WeightFormat::kFp8Block, 256, 1, data.data(),
                                  scales.data(),           1.0f};
  const auto y = multiply(*rounded(WeightFormat::kFp8Block).front(), weight, one, 1, true);
  for (std::size_t i = 0; i < 256; ++i) {
    const float expected = format::e4m3_to_float(static_cast<std::uint8_t>(i)) * factors[i / 128];
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(y[i])) << i;
    } else {
      EXPECT_EQ(y[i], expected) << i;
    }
  }
}

// One code of a wide row, with multipliers of every kind, for few tokens and for many.
TEST_P(MatmulOf, EveryFp8CodeHasItsValueInAWideRow) {
  constexpr std::int64_t kCols = 128 + 100;
  const std::vector<float> multipliers = {0.25f, -3.0f, 1000.0f, 0x1p-130f, std::nanf("")};
  for (int code = 0; code < 256; ++code) {
    const auto column = static_cast<std::size_t>(code * 37 % kCols);
    const float multiplier = multipliers[static_cast<std::size_t>(code * 7 / 3 % 5)];
    std::vector<std::byte> data(3 * kCols, std::byte{0x38});  // 1
    data[kCols + column] = std::byte(code);
    std::vector<std::byte> scales(2 * sizeof(float));
    const float one = 1.0f;
    std::memcpy(scales.data() + (column < 128 ? 4 : 0), &one, sizeof(one));
    std::memcpy(scales.data() + (column < 128 ? 0 : 4), &multiplier, sizeof(multiplier));
    const format::WeightView weight{WeightFormat::kFp8Block, 3,   kCols, data.data(),
                                    scales.data(),           1.0f};
    const float expected = format::e4m3_to_float(static_cast<std::uint8_t>(code)) * multiplier;
    for (const std::int64_t tokens : {1, 2, 5, 7, 20}) {
      std::vector<float> x(static_cast<std::size_t>(tokens * kCols));
      for (std::size_t t = 0; t < static_cast<std::size_t>(tokens); ++t) {
        x[t * kCols + column] = 1.0f;
      }
      const auto y = multiply(*rounded(WeightFormat::kFp8Block).front(), weight, x, tokens, true);
      for (std::size_t i = 0; i < y.size(); ++i) {
        const float value = i % 3 == 1 ? expected : multiplier;
        if (std::isnan(value)) {
          ASSERT_TRUE(std::isnan(y[i])) << "code " << code << ", token " << i / 3;
        } else {
          ASSERT_EQ(y[i], value) << "code " << code << ", token " << i / 3 << " of " << tokens;
        }
      }
    }
  }
}

TEST_P(MatmulOf, NothingToMultiplyIsZero) {
  for (const Case& c : cases()) {
    const auto empty = random_weight(c.format, 5, 0, 51);
    for (const std::int64_t tokens : {1, 7}) {
      EXPECT_EQ(multiply(*c.matmul, empty.view(), {}, tokens, c.round),
                std::vector<float>(static_cast<std::size_t>(5 * tokens), 0.0f))
          << label(c);
    }
    const auto matrix = random_weight(c.format, 5, 32, 52);
    EXPECT_TRUE(multiply(*c.matmul, matrix.view(), {}, 0, c.round).empty());
  }
}

TEST_P(MatmulOf, BadActivationsStayVisible) {
  for (const Case& c : cases()) {
    const auto matrix = random_weight(c.format, 3, 256, 61);
    for (const float bad : {std::nanf(""), INFINITY}) {
      auto x = random_values(2 * 256, 62);
      x[200] = bad;
      const auto y = multiply(*c.matmul, matrix.view(), x, 2, c.round);
      EXPECT_FALSE(std::isfinite(y[0])) << label(c);
      EXPECT_TRUE(std::isfinite(y[3])) << label(c);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, MatmulOf, ::testing::ValuesIn(isas_under_test()),
                         [](const auto& isa) { return std::string(isa.param->name); });

TEST(IsaChoice, NamesAreChecked) {
  EXPECT_EQ(isa_named("").name, runnable_isas().front()->name);
  EXPECT_EQ(isa_named("scalar").name, "baseline");
  EXPECT_EQ(isa_named("baseline").name, "baseline");
  EXPECT_THROW(isa_named("avx1024"), ParameterError);
  EXPECT_THROW(isa_named("AVX2"), ParameterError);
}

}  // namespace
}  // namespace dsfp4::ops::cpu
