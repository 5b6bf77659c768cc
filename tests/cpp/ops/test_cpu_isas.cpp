// The CPU backend on each instruction set under test, in both phases, against `reference`: linear
// and experts at odd sizes, and the promise that a token's result depends on nothing but itself.
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "ops/cpu/cpu_backend.h"
#include "ops/random_weight.h"
#include "ops/under_test.h"

namespace dsfp4::ops::cpu {
namespace {

using format::WeightFormat;
using testing::kAllFormats;
using testing::OwnedMatrix;
using testing::random_weight;
using testing::relative_error;

constexpr double kTolerance = 5e-3;  // BF16 inputs

class CpuIsa : public ::testing::TestWithParam<std::tuple<const Isa*, Phase>> {
 protected:
  std::unique_ptr<CpuBackend> backend(int threads) const {
    return std::make_unique<CpuBackend>(threads, *std::get<0>(GetParam()));
  }
  static Phase phase() { return std::get<1>(GetParam()); }
};

TEST_P(CpuIsa, LinearAgreesWithReference) {
  const auto reference = make_reference_ops(1);
  const auto cpu = backend(2);
  struct Size {
    std::int64_t rows, cols, tokens;
  };
  for (const WeightFormat format : kAllFormats) {
    for (const Size& size : {Size{1, 32, 1},
                             {131, 352, 7},
                             {64, 672, 16},
                             {33, 1056, 17},
                             {200, 96, 50},
                             {5, 64, 0}}) {
      const auto weight = random_weight(format, size.rows, size.cols, 1);
      OwnedMatrix x(size.tokens, size.cols, 2);
      OwnedMatrix expected(size.tokens, size.rows);
      OwnedMatrix actual(size.tokens, size.rows);
      reference->linear(weight.view(), x.view(), expected.view(), phase());
      cpu->linear(weight.view(), x.view(), actual.view(), phase(), Inputs::kBf16);
      EXPECT_LE(relative_error(actual.values, expected.values), kTolerance)
          << format::weight_format_name(format) << " " << size.rows << " x " << size.cols;
      cpu->linear(weight.view(), x.view(), actual.view(), phase(), Inputs::kF32);
      EXPECT_LE(relative_error(actual.values, expected.values), 2e-6);
    }
  }
}

TEST_P(CpuIsa, LinearOfATokenAloneIsTheSame) {
  const auto one = backend(1);
  const auto five = backend(5);
  for (const WeightFormat format : kAllFormats) {
    const auto weight = random_weight(format, 150, 608, 3);
    OwnedMatrix x(37, 608, 4);
    OwnedMatrix together(37, 150);
    OwnedMatrix other(37, 150);
    one->linear(weight.view(), x.view(), together.view(), phase(), Inputs::kBf16);
    five->linear(weight.view(), x.view(), other.view(), phase(), Inputs::kBf16);
    EXPECT_EQ(together.values, other.values);
    for (std::int64_t t = 0, count = 1; t < 37; t += count, count = std::min(count * 2, 37 - t)) {
      five->linear(weight.view(), x.view().slice(t, count), other.view().slice(t, count), phase(),
                   Inputs::kBf16);
    }
    EXPECT_EQ(together.values, other.values) << format::weight_format_name(format);
  }
}

struct Experts {
  Experts(WeightFormat gate_format, WeightFormat up_format, WeightFormat down_format,
          std::uint32_t seed)
      : gate(random_weight(gate_format, kIntermediate, kHidden, seed)),
        up(random_weight(up_format, kIntermediate, kHidden, seed + 1)),
        down(random_weight(down_format, kHidden, kIntermediate, seed + 2)),
        view{gate.view(), up.view(), down.view()} {}

  static constexpr std::int64_t kHidden = 288;
  static constexpr std::int64_t kIntermediate = 160;
  format::EncodedMatrix gate, up, down;
  ExpertView view;
};

TEST_P(CpuIsa, ExpertsAgreeWithReferenceInAnyGrouping) {
  const auto reference = make_reference_ops(1);
  const auto one = backend(1);
  const auto three = backend(3);
  constexpr std::int64_t kTokens = 21;
  constexpr std::int64_t kTopK = 3;
  const std::vector<std::tuple<WeightFormat, WeightFormat, WeightFormat>> mixtures = {
      {WeightFormat::kNvfp4, WeightFormat::kNvfp4, WeightFormat::kNvfp4},
      {WeightFormat::kMxfp4, WeightFormat::kMxfp4, WeightFormat::kMxfp4},
      {WeightFormat::kFp8Block, WeightFormat::kFp8Block, WeightFormat::kFp8Block},
      {WeightFormat::kBF16, WeightFormat::kBF16, WeightFormat::kNvfp4},
      {WeightFormat::kNvfp4, WeightFormat::kFp8Block, WeightFormat::kBF16},
      {WeightFormat::kF32, WeightFormat::kF32, WeightFormat::kF32}};
  std::uint32_t seed = 10;
  for (const auto& [gate, up, down] : mixtures) {
    const Experts a(gate, up, down, seed++);
    const Experts b(gate, up, down, seed++);
    OwnedMatrix x(kTokens, Experts::kHidden, seed++);
    // Expert a: every second pair; b: all others but the last.
    std::vector<std::int32_t> even;
    std::vector<std::int32_t> odd;
    for (std::int32_t p = 0; p + 1 < kTokens * kTopK; ++p) (p % 2 == 0 ? even : odd).push_back(p);
    const std::vector<ExpertTask> whole = {{&a.view, even}, {&b.view, odd}};
    const std::vector<ExpertTask> parts = {{&b.view, std::span(odd).first(7)},
                                           {&a.view, std::span(even).subspan(18)},
                                           {&b.view, std::span(odd).subspan(7)},
                                           {&a.view, std::span(even).first(18)}};
    const auto run = [&](Ops& ops, const std::vector<ExpertTask>& tasks) {
      OwnedMatrix hidden(kTokens * kTopK, Experts::kIntermediate);
      OwnedMatrix out(kTokens * kTopK, Experts::kHidden);
      ops.experts(tasks, kTopK, x.view(), hidden.view(), out.view(), phase());
      return out.values;
    };
    const auto result = run(*one, whole);
    EXPECT_LT(relative_error(result, run(*reference, whole)), kTolerance)
        << format::weight_format_name(gate);
    EXPECT_EQ(result, run(*three, parts)) << format::weight_format_name(gate);
    EXPECT_EQ(result.back(), -777.0f) << "a pair that no task names is left alone";
  }
}

TEST_P(CpuIsa, ExpertsAreAddedInOrderInAnyGrouping) {
  const auto reference = make_reference_ops(1);
  const auto one = backend(1);
  const auto three = backend(3);
  constexpr std::int64_t kTokens = 21;
  constexpr std::int64_t kTopK = 2;
  constexpr WeightFormat kFormat = WeightFormat::kNvfp4;
  const Experts a(kFormat, kFormat, kFormat, 60);
  const Experts b(kFormat, kFormat, WeightFormat::kBF16, 61);
  OwnedMatrix x(kTokens, Experts::kHidden, 62);
  std::vector<float> mixing;
  std::vector<std::int32_t> even, odd;  // one of each token; the last has none
  for (std::int32_t p = 0; p + 2 < kTokens * kTopK; ++p) (p % 2 == 0 ? even : odd).push_back(p);
  for (std::int64_t p = 0; p < kTokens * kTopK; ++p) {
    mixing.push_back(0.7f / static_cast<float>(1 + p));
  }
  using Calls = std::vector<std::vector<ExpertTask>>;
  const Calls whole = {{{&b.view, odd}, {&a.view, even}}};
  const Calls parts = {{{&b.view, std::span(odd).first(7)}},
                       {{&b.view, std::span(odd).subspan(7)}, {&a.view, std::span(even).first(3)}},
                       {{&a.view, std::span(even).subspan(3)}}};
  const auto run_in = [&](std::int64_t rows, Ops& ops, const Calls& calls) {
    OwnedMatrix hidden(rows, Experts::kIntermediate);
    OwnedMatrix out(rows, Experts::kHidden);
    OwnedMatrix y(kTokens, Experts::kHidden, 63);
    for (const auto& tasks : calls) {
      ops.add_experts(tasks, mixing, kTopK, x.view(), hidden.view(), out.view(), y.view(), phase());
    }
    return y.values;
  };
  const auto run = [&](Ops& ops, const Calls& calls) { return run_in(2 * kTokens, ops, calls); };
  // The same as experts(), whose rows are multiplied and added one after the other.
  const auto added = [&](Ops& ops) {
    OwnedMatrix hidden(kTokens * kTopK, Experts::kIntermediate);
    OwnedMatrix out(kTokens * kTopK, Experts::kHidden);
    OwnedMatrix y(kTokens, Experts::kHidden, 63);
    ops.experts(whole[0], kTopK, x.view(), hidden.view(), out.view(), phase());
    for (const ExpertTask& task : whole[0]) {
      for (const std::int32_t p : task.pairs) {
        for (std::int64_t i = 0; i < Experts::kHidden; ++i) {
          y.values[static_cast<std::size_t>(p / kTopK * Experts::kHidden + i)] +=
              mixing[static_cast<std::size_t>(p)] *
              out.values[static_cast<std::size_t>(p * Experts::kHidden + i)];
        }
      }
    }
    return y.values;
  };
  const auto result = run(*one, whole);
  EXPECT_LT(relative_error(run(*reference, whole), added(*reference)), 1e-6);
  EXPECT_LT(relative_error(result, added(*one)), 1e-6);
  EXPECT_LT(relative_error(result, run(*reference, whole)), kTolerance);
  EXPECT_EQ(result, run(*three, parts));
  const OwnedMatrix untouched(kTokens, Experts::kHidden, 63);
  EXPECT_EQ(result.back(), untouched.values.back()) << "a token that no task names is left alone";

  for (const std::int64_t rows : {1, 3, 7, 8}) {  // of scratch: also fewer than a task has pairs
    EXPECT_EQ(result, run_in(rows, *one, whole)) << rows;
  }
  EXPECT_EQ(run(*reference, whole), run_in(3, *reference, whole));
  EXPECT_THROW(run_in(0, *one, whole), std::logic_error);
}

// The phases differ where the table says so, and nowhere else.
TEST_P(CpuIsa, PhaseChoosesTheArithmetic) {
  const Isa& isa = *std::get<0>(GetParam());
  const auto cpu = backend(1);
  const auto weight = random_weight(WeightFormat::kNvfp4, 40, 2048, 50);
  OwnedMatrix x(20, 2048, 51);
  OwnedMatrix a(20, 40);
  OwnedMatrix b(20, 40);
  cpu->linear(weight.view(), x.view(), a.view(), Phase::kDecode, Inputs::kBf16);
  cpu->linear(weight.view(), x.view(), b.view(), phase(), Inputs::kBf16);
  if ((isa.tiles == nullptr && isa.decode == isa.prefill) || phase() == Phase::kDecode) {
    EXPECT_EQ(a.values, b.values);
  } else {
    EXPECT_NE(a.values, b.values) << "prefill has its own arithmetic";
    EXPECT_LT(relative_error(b.values, a.values), kTolerance);
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, CpuIsa,
                         ::testing::Combine(::testing::ValuesIn(isas_under_test()),
                                            ::testing::Values(Phase::kDecode, Phase::kPrefill)),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param)->name) +
                                  (std::get<1>(info.param) == Phase::kPrefill ? "_prefill"
                                                                              : "_decode");
                         });

}  // namespace
}  // namespace dsfp4::ops::cpu
