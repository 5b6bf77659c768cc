// The formats that dense weights are converted to.
#include <cstdint>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "residency/dense_formats.h"

namespace dsfp4::residency {
namespace {

using format::WeightFormat;

constexpr DenseRole kRoles[] = {DenseRole::kAttention, DenseRole::kOProj, DenseRole::kSharedExperts,
                                DenseRole::kMlp, DenseRole::kLmHead};

TEST(DenseFormats, RolesHaveNames) {
  for (const DenseRole role : kRoles) EXPECT_EQ(dense_role(dense_role_name(role)), role);
  EXPECT_EQ(dense_role_name(DenseRole::kMlp), "mlp");
  EXPECT_FALSE(dense_role("router"));
}

TEST(DenseFormats, AMatrixIsConvertedOnlyIfItGetsSmaller) {
  DenseFormats formats;
  EXPECT_FALSE(formats.any());
  EXPECT_EQ(formats.of(DenseRole::kMlp, WeightFormat::kBF16, 128, 128), WeightFormat::kBF16);
  formats.of(DenseRole::kMlp) = WeightFormat::kFp8Block;
  formats.of(DenseRole::kOProj) = WeightFormat::kNvfp4;
  EXPECT_TRUE(formats.any());
  const auto of = [&](DenseRole role, WeightFormat published, std::int64_t rows = 128,
                      std::int64_t cols = 128) { return formats.of(role, published, rows, cols); };
  EXPECT_EQ(of(DenseRole::kMlp, WeightFormat::kBF16), WeightFormat::kFp8Block);
  EXPECT_EQ(of(DenseRole::kMlp, WeightFormat::kF32), WeightFormat::kFp8Block);
  EXPECT_EQ(of(DenseRole::kMlp, WeightFormat::kFp8Block), WeightFormat::kFp8Block);
  EXPECT_EQ(of(DenseRole::kMlp, WeightFormat::kNvfp4), WeightFormat::kNvfp4);
  EXPECT_EQ(of(DenseRole::kMlp, WeightFormat::kBF16, 1, 2), WeightFormat::kBF16);  // 6 bytes, not 4
  EXPECT_EQ(of(DenseRole::kMlp, WeightFormat::kBF16, 1, 4), WeightFormat::kBF16);  // 8, as before
  EXPECT_EQ(of(DenseRole::kOProj, WeightFormat::kFp8Block), WeightFormat::kNvfp4);
  EXPECT_EQ(of(DenseRole::kOProj, WeightFormat::kMxfp4), WeightFormat::kMxfp4);
  EXPECT_EQ(of(DenseRole::kOProj, WeightFormat::kBF16, 128, 24), WeightFormat::kBF16);
  EXPECT_EQ(of(DenseRole::kAttention, WeightFormat::kBF16), WeightFormat::kBF16);
}

TEST(DenseFormats, AreSaidInWords) {
  EXPECT_EQ(describe({}), "");
  DenseFormats formats;
  formats.of(DenseRole::kAttention) = WeightFormat::kFp8Block;
  formats.of(DenseRole::kMlp) = WeightFormat::kFp8Block;
  EXPECT_EQ(describe(formats), "attention and mlp to fp8");
  formats.of(DenseRole::kMlp) = WeightFormat::kNvfp4;
  EXPECT_EQ(describe(formats), "attention to fp8, mlp to nvfp4");
}

TEST(DenseFormats, TheLadderTakesFp8FirstAndLeavesTheHead) {
  const auto ladder = format_ladder();
  EXPECT_FALSE(ladder.front().any());
  bool nvfp4 = false;
  for (std::size_t i = 1; i < ladder.size(); ++i) {
    EXPECT_FALSE(ladder[i].by_role[static_cast<std::size_t>(DenseRole::kLmHead)]);
    EXPECT_NE(ladder[i].by_role[static_cast<std::size_t>(DenseRole::kAttention)],
              WeightFormat::kNvfp4);
    for (const DenseRole role : kRoles) {
      const auto before = ladder[i - 1].by_role[static_cast<std::size_t>(role)];
      const auto now = ladder[i].by_role[static_cast<std::size_t>(role)];
      if (now == before) continue;
      EXPECT_EQ(before.has_value(), now == WeightFormat::kNvfp4);  // by way of FP8
      nvfp4 = nvfp4 || now == WeightFormat::kNvfp4;
      EXPECT_EQ(nvfp4, now == WeightFormat::kNvfp4);
    }
  }
}

// The cheapest by measured loss comes first.
TEST(DenseFormats, TheLaddersStepsAreThese) {
  std::vector<std::string> steps;
  for (const DenseFormats& formats : format_ladder()) steps.push_back(describe(formats));
  EXPECT_EQ(steps, (std::vector<std::string>{
                       "", "attention and o_proj to fp8",
                       "attention and o_proj and shared_experts and mlp to fp8",
                       "attention and shared_experts and mlp to fp8, o_proj to nvfp4",
                       "attention and shared_experts to fp8, o_proj and mlp to nvfp4",
                       "attention to fp8, o_proj and shared_experts and mlp to nvfp4"}));
}

}  // namespace
}  // namespace dsfp4::residency
