// Every instruction set's layer kernels that this CPU runs, against plain loops.
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include <gtest/gtest.h>

#include "format/scalar.h"
#include "ops/cpu/layer_kernels.h"
#include "ops/random_weight.h"

namespace dsfp4::ops::cpu {
namespace {

using testing::random_values;
using testing::relative_error;

std::vector<const LayerKernels*> usable() {
  __builtin_cpu_init();
  std::vector<const LayerKernels*> tables = {&kBaselineLayerKernels};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    tables.push_back(&kAvx2LayerKernels);
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    tables.push_back(&kAvx512LayerKernels);
  }
  return tables;
}

class LayerKernelsOf : public ::testing::TestWithParam<const LayerKernels*> {
 protected:
  const LayerKernels& kernels_ = *GetParam();
};

// C of a product whose A is stored by rows or (`transposed`) by columns.
std::vector<float> product(const LayerKernels& kernels, std::int64_t m, std::int64_t n,
                           std::int64_t k, bool transposed, bool add) {
  const std::vector<float> a = random_values(m * k, 1);
  const std::int64_t width = (n + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
  std::vector<float> b = random_values(k * width, 2);
  std::vector<float> c(static_cast<std::size_t>(m * width), 0.5f);
  const SmallProduct p{a.data(),
                       transposed ? 1 : k,
                       transposed ? m : 1,
                       b.data(),
                       width,
                       kernels.panel,
                       c.data(),
                       width,
                       m,
                       n,
                       k};
  (add ? kernels.multiply_add : kernels.multiply)(p);
  std::vector<float> actual;
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      double sum = add ? 0.5 : 0.0;
      for (std::int64_t l = 0; l < k; ++l) {
        const float factor = a[static_cast<std::size_t>(transposed ? l * m + i : i * k + l)];
        sum += static_cast<double>(factor) * b[static_cast<std::size_t>(l * width + j)];
      }
      const float got = c[static_cast<std::size_t>(i * width + j)];
      EXPECT_NEAR(got, sum, 1e-5 * static_cast<double>(k)) << m << " " << n << " " << k;
      actual.push_back(got);
    }
  }
  return actual;
}

TEST_P(LayerKernelsOf, ProductsOfEveryTail) {
  for (const std::int64_t m : {1, 2, 5, 6, 7, 13}) {
    for (const std::int64_t n : {1, 4, 15, 16, 17, 63, 65, 130}) {
      for (const std::int64_t k : {1, 2, 37}) {
        for (const bool transposed : {false, true}) {
          product(kernels_, m, n, k, transposed, false);
          product(kernels_, m, n, k, transposed, true);
        }
      }
    }
  }
}

TEST_P(LayerKernelsOf, SoftmaxInStepsEqualsSoftmaxAtOnce) {
  const std::int64_t lanes = kernels_.lanes;
  const std::vector<float> scores = random_values(11 * lanes, 3);
  std::vector<float> maximum(static_cast<std::size_t>(lanes),
                             -std::numeric_limits<float>::infinity());
  std::vector<float> sum(maximum.size(), 0.0f);
  std::vector<float> rescale(maximum.size());
  std::vector<double> weights(scores.size());
  std::vector<std::int32_t> visible(maximum.size());
  const auto step = [&](std::int64_t first, std::int64_t keys, bool mask) {
    // Lane i sees i % 5 more keys than one.
    for (std::size_t i = 0; i < visible.size(); ++i) visible[i] = 1 + static_cast<int>(i % 5);
    std::vector<float> part(scores.begin() + first * lanes,
                            scores.begin() + (first + keys) * lanes);
    kernels_.softmax_step({part.data(), lanes, keys, lanes, 40.0f, mask ? visible.data() : nullptr,
                           maximum.data(), sum.data(), rescale.data()});
    for (std::size_t i = 0; i < static_cast<std::size_t>(first * lanes); ++i) {
      weights[i] *= rescale[i % rescale.size()];
    }
    std::copy(part.begin(), part.end(), weights.begin() + first * lanes);
  };
  step(0, 6, false);
  step(6, 5, true);
  for (std::int64_t lane = 0; lane < lanes; ++lane) {
    const std::int64_t seen = 6 + std::min<std::int64_t>(5, 1 + lane % 5);
    double largest = -1e30;
    for (std::int64_t s = 0; s < seen; ++s) {
      largest = std::max(largest, 40.0 * scores[static_cast<std::size_t>(s * lanes + lane)]);
    }
    double total = 0.0;
    for (std::int64_t s = 0; s < 11; ++s) {
      const auto at = static_cast<std::size_t>(s * lanes + lane);
      const double expected = s < seen ? std::exp(40.0 * scores[at] - largest) : 0.0;
      total += expected;
      EXPECT_NEAR(weights[at], expected, 1e-5) << "key " << s << ", lane " << lane;
    }
    EXPECT_NEAR(sum[static_cast<std::size_t>(lane)], total, 1e-5 * total);
  }
}

TEST_P(LayerKernelsOf, EveryE4m3CodeAndEveryBf16Code) {
  std::vector<std::uint8_t> codes(256);
  std::iota(codes.begin(), codes.end(), std::uint8_t{0});
  std::vector<float> values(codes.size());
  for (const std::int64_t n : {256, 255, 3}) {
    kernels_.e4m3_to_float(codes.data(), 0.5f, values.data(), n);
    for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i) {
      const float expected = format::e4m3_to_float(codes[i]) * 0.5f;
      if (std::isnan(expected)) {
        EXPECT_TRUE(std::isnan(values[i])) << i;
      } else {
        EXPECT_EQ(values[i], expected) << i;
        EXPECT_EQ(std::signbit(values[i]), std::signbit(expected)) << i;
      }
    }
  }
  std::vector<std::uint16_t> wide(65536);
  std::iota(wide.begin(), wide.end(), std::uint16_t{0});
  std::vector<float> floats(wide.size());
  kernels_.bf16_to_float(wide.data(), floats.data(), 65536);
  for (std::size_t i = 0; i < wide.size(); ++i) {
    const float expected = format::bf16_to_float(wide[i]);
    EXPECT_EQ(std::memcmp(&floats[i], &expected, sizeof(float)), 0) << i;
  }
}

TEST_P(LayerKernelsOf, SiluOverItsWholeRange) {
  std::vector<float> gate;
  for (float x = -120.0f; x < 120.0f; x += 0.37f) gate.push_back(x);
  gate.insert(gate.end(), {0.0f, -1e30f, 1e30f, 1e-30f});
  const std::vector<float> up(gate.size(), 2.0f);
  std::vector<float> actual = gate;
  kernels_.silu_mul(actual.data(), up.data(), static_cast<std::int64_t>(gate.size()));
  for (std::size_t i = 0; i < gate.size(); ++i) {
    const double x = gate[i];
    const double expected = x / (1.0 + std::exp(-x)) * 2.0;
    EXPECT_NEAR(actual[i], expected, 1e-6 * std::abs(expected) + 1e-30) << x;
    float alone = gate[i];  // a value does not depend on its place
    kernels_.silu_mul(&alone, up.data(), 1);
    EXPECT_EQ(alone, actual[i]);
  }
}

TEST_P(LayerKernelsOf, DotsDoNotDependOnTheirCompany) {
  for (const std::int64_t k : {1, 31, 64, 200}) {
    const std::vector<float> w = random_values(k, 4);
    const std::vector<float> x = random_values(5 * k, 5);
    std::vector<float> together(5);
    kernels_.dot(w.data(), k, x.data(), k, 5, 0.5f, together.data(), 1);
    for (std::size_t t = 0; t < 5; ++t) {
      const float* row = x.data() + static_cast<std::int64_t>(t) * k;
      float alone;
      kernels_.dot(w.data(), k, row, k, 1, 0.5f, &alone, 1);
      EXPECT_EQ(alone, together[t]);
      EXPECT_NEAR(alone, 0.5 * std::inner_product(w.begin(), w.end(), row, 0.0), 1e-4);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Usable, LayerKernelsOf, ::testing::ValuesIn(usable()),
                         [](const auto& table) { return std::string(table.param->isa); });

TEST(LayerKernels, EachInstructionSetHasItsTable) {
  EXPECT_EQ(&layer_kernels_for("avx512bf16"), &kAvx512LayerKernels);
  EXPECT_EQ(&layer_kernels_for("amx"), &kAvx512LayerKernels);
  EXPECT_EQ(&layer_kernels_for("avx2"), &kAvx2LayerKernels);
  EXPECT_EQ(&layer_kernels_for("baseline"), &kBaselineLayerKernels);
}

}  // namespace
}  // namespace dsfp4::ops::cpu
