// Routed and shared experts of the CUDA backend against `reference`.
#include <numeric>
#include <ostream>
#include <vector>

#include <gtest/gtest.h>

#include "ops/cuda_fixture.h"

namespace dsfp4::ops {
namespace {

using format::WeightFormat;

struct ExpertsCase {
  WeightFormat gate, up, down;
  std::int64_t experts, top_k, hidden, intermediate, tokens;
};

std::ostream& operator<<(std::ostream& out, const ExpertsCase& c) {
  for (const WeightFormat format : {c.gate, c.up, c.down}) {
    out << format::weight_format_name(format) << " ";
  }
  return out << c.top_k << " of " << c.experts << ", " << c.hidden << " x " << c.intermediate
             << ", " << c.tokens << " tokens";
}

class CudaExperts : public Cuda, public ::testing::WithParamInterface<ExpertsCase> {};

TEST_P(CudaExperts, AgreeWithReference) {
  const ExpertsCase c = GetParam();
  std::vector<format::EncodedMatrix> matrices;
  matrices.reserve(static_cast<std::size_t>(3 * c.experts));
  std::vector<ExpertView> host;
  std::vector<ExpertView> device;
  for (std::int64_t e = 0; e < c.experts; ++e) {
    const auto seed = static_cast<std::uint32_t>(100 + 3 * e);
    const auto next = [&](WeightFormat format, std::int64_t rows, std::int64_t cols,
                          int i) -> const format::EncodedMatrix& {
      matrices.push_back(random_weight(format, rows, cols, seed + static_cast<std::uint32_t>(i)));
      return matrices.back();
    };
    const auto& gate = next(c.gate, c.intermediate, c.hidden, 0);
    const auto& up = next(c.up, c.intermediate, c.hidden, 1);
    const auto& down = next(c.down, c.hidden, c.intermediate, 2);
    host.push_back({gate.view(), up.view(), down.view()});
    device.push_back({on_device(gate), on_device(up), on_device(down)});
  }
  OwnedMatrix x(c.tokens, c.hidden, 43);
  OwnedMatrix y(c.tokens, c.hidden, 44);  // what the shared experts gave
  const std::int64_t pairs = c.tokens * c.top_k;
  const auto count = static_cast<std::size_t>(pairs);
  const std::vector<float> weights = random_values(pairs, 45);
  std::vector<std::int32_t> used(count);
  std::vector<std::vector<std::int32_t>> by_expert(static_cast<std::size_t>(c.experts));
  for (std::int64_t p = 0; p < pairs; ++p) {  // distinct within a token; expert 1 is never chosen
    std::int64_t e = (p / c.top_k * 5 + p % c.top_k) % c.experts;
    if (c.experts > c.top_k && e == 1) e = (p / c.top_k * 5 + c.top_k) % c.experts;
    used[static_cast<std::size_t>(p)] = static_cast<std::int32_t>(e);
    by_expert[static_cast<std::size_t>(e)].push_back(static_cast<std::int32_t>(p));
  }
  const Matrix dy = on_device(y);
  std::vector<ExpertTask> tasks;
  for (std::size_t e = 0; e < host.size(); ++e) {
    if (!by_expert[e].empty()) tasks.push_back({&host[e], by_expert[e]});
  }
  OwnedMatrix hidden(pairs, c.intermediate);
  OwnedMatrix routed(pairs, c.hidden);
  const Matrix dhidden = on_device(hidden);
  const Matrix drouted = on_device(routed);
  reference_->experts(tasks, c.top_k, x.view(), hidden.view(), routed.view());
  reference_->combine(routed.view(), weights, c.top_k, y.view());

  std::int32_t* dused = on_device(used.data(), count);
  std::vector<float> weights_copy = weights;
  float* dweights = on_device(weights_copy.data(), count);
  const Routing routing{{dused, count}, {dused, count}, {dweights, count}};
  ASSERT_TRUE(backend_->routed_experts(device, routing, c.top_k, on_device(x), dhidden, drouted, dy,
                                       nullptr));
  EXPECT_LT(relative_error(on_host(dy), y.values), kTolerance);

  // Expert 1 as the shared one: with the others, or alone before them.
  if (!backend_->takes_shared(device, device[1], c.tokens, c.top_k)) return;
  std::vector<std::int32_t> all(static_cast<std::size_t>(c.tokens));
  std::iota(all.begin(), all.end(), 0);
  OwnedMatrix shared_hidden(c.tokens, c.intermediate);
  OwnedMatrix expected(c.tokens, c.hidden);
  const ExpertTask one[] = {{&host[1], all}};
  reference_->experts(one, 1, x.view(), shared_hidden.view(), expected.view());
  reference_->combine(routed.view(), weights, c.top_k, expected.view());
  const OwnedMatrix more(pairs + c.tokens, c.intermediate);
  ASSERT_TRUE(backend_->routed_experts(device, routing, c.top_k, on_device(x), on_device(more),
                                       drouted, dy, &device[1]));
  EXPECT_LT(relative_error(on_host(dy), expected.values), kTolerance);
}

constexpr auto kNv = WeightFormat::kNvfp4;
constexpr auto kMx = WeightFormat::kMxfp4;
constexpr auto kF8 = WeightFormat::kFp8Block;
constexpr auto kBf = WeightFormat::kBF16;
INSTANTIATE_TEST_SUITE_P(
    All, CudaExperts,
    ::testing::Values(ExpertsCase{kNv, kF8, kNv, 4, 2, 96, 48, 3},     // mixed
                      ExpertsCase{kNv, kNv, kNv, 12, 3, 144, 80, 5},   // rows of no 16 bytes
                      ExpertsCase{kBf, kBf, kBf, 6, 2, 51, 27, 4},     // odd
                      ExpertsCase{kNv, kNv, kNv, 16, 8, 512, 256, 1},  // one token
                      ExpertsCase{kMx, kMx, kMx, 16, 6, 512, 256, 1},
                      ExpertsCase{kF8, kF8, kF8, 16, 8, 512, 256, 1},
                      ExpertsCase{kBf, kBf, kBf, 16, 8, 512, 256, 1},
                      ExpertsCase{kNv, kNv, kNv, 16, 8, 640, 384, 1},  // odd chunks of 128 columns
                      ExpertsCase{kMx, kMx, kMx, 16, 8, 640, 384, 2},
                      ExpertsCase{kNv, kNv, kNv, 16, 8, 384, 128, 7},   // a few
                      ExpertsCase{kNv, kNv, kNv, 16, 8, 512, 256, 70},  // many
                      ExpertsCase{kMx, kMx, kMx, 16, 6, 512, 256, 70},
                      // Scales of a row in whole units of 16 bytes, gate and up, and not, down.
                      ExpertsCase{kNv, kNv, kNv, 16, 8, 1280, 640, 70},
                      ExpertsCase{kMx, kMx, kMx, 16, 8, 1536, 640, 70},
                      ExpertsCase{kF8, kF8, kF8, 16, 4, 384, 128, 70},
                      ExpertsCase{kBf, kBf, kBf, 16, 4, 384, 128, 70},
                      // 14 to 18 an expert: products of 16 tokens, and of 32.
                      ExpertsCase{kNv, kNv, kNv, 16, 8, 512, 256, 30},
                      ExpertsCase{kMx, kMx, kMx, 16, 8, 512, 256, 30},
                      ExpertsCase{kF8, kF8, kF8, 16, 8, 384, 256, 30},
                      ExpertsCase{kBf, kBf, kBf, 16, 8, 160, 96, 30},
                      // 54 to 69 an expert: products of 64 tokens, and of 128.
                      ExpertsCase{kNv, kNv, kNv, 8, 4, 512, 256, 110},
                      ExpertsCase{kMx, kMx, kMx, 8, 4, 512, 256, 110},
                      ExpertsCase{kF8, kF8, kF8, 8, 4, 384, 256, 110},
                      ExpertsCase{kBf, kBf, kBf, 8, 4, 160, 96, 110},
                      // 300: two times 144, and 12.
                      ExpertsCase{kNv, kNv, kNv, 3, 2, 512, 256, 300},
                      ExpertsCase{kMx, kMx, kMx, 3, 2, 512, 256, 300},
                      ExpertsCase{kF8, kF8, kF8, 3, 2, 384, 256, 300},
                      ExpertsCase{kBf, kBf, kBf, 3, 2, 160, 96, 300}));

}  // namespace
}  // namespace dsfp4::ops
