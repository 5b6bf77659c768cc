// The CPU backend against `reference`, and the promise that a token's result does not depend on
// its company or on the number of threads. The formulas themselves are held against a float64
// oracle in tests/python/test_ops.py.
#include <cmath>
#include <vector>

#include <gtest/gtest.h>

#include "engine/kv_cache.h"
#include "ops/ops.h"
#include "ops/random_weight.h"

namespace dsfp4::ops {
namespace {

using testing::kAllFormats;
using testing::OwnedMatrix;
using testing::random_values;
using testing::random_weight;
using testing::relative_error;

constexpr double kTolerance = 5e-3;  // BF16 inputs

TEST(CpuBackend, LinearAgreesWithReference) {
  const auto reference = make_reference_ops(1);
  const auto cpu = make_cpu_ops(2);
  for (const format::WeightFormat format : kAllFormats) {
    for (const auto& [rows, cols] : {std::pair<std::int64_t, std::int64_t>{1, 32}, {130, 352}}) {
      const auto weight = random_weight(format, rows, cols, 1);
      OwnedMatrix x(7, cols, 2);
      OwnedMatrix expected(7, rows);
      OwnedMatrix actual(7, rows);
      reference->linear(weight.view(), x.view(), expected.view(), Phase::kDecode);
      cpu->linear(weight.view(), x.view(), actual.view(), Phase::kDecode);
      EXPECT_LT(relative_error(actual.values, expected.values), kTolerance);
      cpu->linear(weight.view(), x.view(), actual.view(), Phase::kDecode, Inputs::kF32);
      EXPECT_LT(relative_error(actual.values, expected.values), 1e-6);
    }
  }
}

TEST(CpuBackend, TokenAloneAndThreadsChangeNothing) {
  const auto one = make_cpu_ops(1);
  const auto five = make_cpu_ops(5);
  const auto weight = random_weight(format::WeightFormat::kNvfp4, 100, 288, 3);
  OwnedMatrix x(9, 288, 4);
  OwnedMatrix a(9, 100);
  OwnedMatrix b(9, 100);
  one->linear(weight.view(), x.view(), a.view(), Phase::kDecode);
  five->linear(weight.view(), x.view(), b.view(), Phase::kDecode);
  EXPECT_EQ(a.values, b.values);
  for (std::int64_t t = 0; t < 9; ++t) {
    one->linear(weight.view(), x.view().slice(t, 1), b.view().slice(t, 1), Phase::kDecode);
  }
  EXPECT_EQ(a.values, b.values);
}

// Two sequences of different age in one batch, their caches filled by kv_append.
class Attention : public ::testing::Test {
 protected:
  static constexpr std::int64_t kEarlier[2] = {70, 3};
  static constexpr std::int64_t kRows[2] = {5, 2};

  Attention() {
    shape_ = {3, 48, 24, 20, 40, 0.13f};
    kv_b_ = random_weight(format::WeightFormat::kBF16, 3 * 64, 48, 10);
  }

  // [tokens, heads * v] for all rows in one call, or each sequence in a call of its own.
  std::vector<float> run(Ops& ops, bool decode, bool together) {
    engine::KvCache cache(400, 2, kKvBlockTokens * 68 * 4, ops.default_kv_format());
    engine::Sequence sequences[2] = {engine::Sequence(cache), engine::Sequence(cache)};
    OwnedMatrix out(7, 3 * 40);
    std::vector<SequenceRows> batch;
    std::int64_t row = 0;
    for (std::size_t i = 0; i < 2; ++i) {
      OwnedMatrix earlier(kEarlier[i], 68, static_cast<std::uint32_t>(20 + i));
      append(ops, sequences[i].next_rows(0, kEarlier[i]), earlier.view());
      sequences[i].advance(kEarlier[i]);
      batch.push_back(in_second_layer(sequences[i].next_rows(row, kRows[i])));
      row += kRows[i];
    }
    OwnedMatrix latents(7, 68, 30);
    OwnedMatrix q(7, 3 * 44, 31);
    ops.kv_append(batch, latents.view());
    if (together) {
      attend(ops, decode, batch, q.view(), out.view());
    } else {
      for (const SequenceRows& sequence : batch)
        attend(ops, decode, {&sequence, 1}, q.view(), out.view());
    }
    return out.values;
  }

 private:
  static SequenceRows in_second_layer(SequenceRows rows) {
    rows.kv.layer_offset = kKvBlockTokens * 68 * kv_value_bytes(rows.kv.format);
    return rows;
  }
  static void append(Ops& ops, SequenceRows rows, ConstMatrix x) {
    rows = in_second_layer(rows);
    ops.kv_append({&rows, 1}, x);
  }
  void attend(Ops& ops, bool decode, std::span<const SequenceRows> batch, Matrix q, Matrix out) {
    if (!decode) {
      ops.prefill_attention(shape_, kv_b_.view(), batch, q, out);
      return;
    }
    OwnedMatrix q_abs(7, 3 * 48);
    OwnedMatrix attended(7, 3 * 48);
    ops.absorb_query(shape_, kv_b_.view(), q, q_abs.view());
    ops.latent_attention(shape_, batch, q_abs.view(), q, attended.view());
    for (const SequenceRows& s : batch) {
      ops.expand_value(shape_, kv_b_.view(), attended.view().slice(s.first_row, s.rows),
                       out.slice(s.first_row, s.rows));
    }
  }

  MlaShape shape_;
  format::EncodedMatrix kv_b_;
};

TEST_F(Attention, DecodeEqualsPrefill) {
  const auto reference = make_reference_ops(2);
  EXPECT_LT(relative_error(run(*reference, true, true), run(*reference, false, true)), 1e-5);
}

TEST_F(Attention, CpuAgreesWithReference) {
  const auto reference = make_reference_ops(2);
  const auto cpu = make_cpu_ops(2);
  for (const bool decode : {false, true}) {
    EXPECT_LT(relative_error(run(*cpu, decode, true), run(*reference, decode, true)), kTolerance);
  }
}

TEST_F(Attention, SequencesDoNotSeeEachOther) {
  for (const bool decode : {false, true}) {
    const auto reference = make_reference_ops(1);
    EXPECT_EQ(run(*reference, decode, true), run(*reference, decode, false));
    const auto cpu = make_cpu_ops(3);
    EXPECT_EQ(run(*cpu, decode, true), run(*cpu, decode, false));
  }
}

TEST(CpuBackend, ExpertsAgreeWithReferenceInAnyGrouping) {
  const auto reference = make_reference_ops(1);
  const auto cpu = make_cpu_ops(2);
  const auto gate = random_weight(format::WeightFormat::kNvfp4, 48, 96, 40);
  const auto up = random_weight(format::WeightFormat::kFp8Block, 48, 96, 41);
  const auto down = random_weight(format::WeightFormat::kNvfp4, 96, 48, 42);
  const ExpertView expert{gate.view(), up.view(), down.view()};
  OwnedMatrix x(3, 96, 43);
  const std::vector<std::int32_t> pairs = {0, 3, 4, 5};
  const std::vector<ExpertTask> whole = {{&expert, pairs}};
  const std::vector<ExpertTask> parts = {{&expert, std::span(pairs).first(1)},
                                         {&expert, std::span(pairs).subspan(1)}};
  const auto run = [&](Ops& ops, const std::vector<ExpertTask>& tasks) {
    OwnedMatrix hidden(6, 48);
    OwnedMatrix out(6, 96);
    ops.experts(tasks, 2, x.view(), hidden.view(), out.view(), Phase::kDecode);
    return out.values;
  };
  EXPECT_LT(relative_error(run(*cpu, whole), run(*reference, whole)), kTolerance);
  EXPECT_EQ(run(*cpu, whole), run(*cpu, parts));
  EXPECT_EQ(run(*cpu, whole)[2 * 96], -777.0f) << "a pair that no task names is left alone";
}

}  // namespace
}  // namespace dsfp4::ops
