#include "ops/measure/kernel_bench.h"

#include "ops/measure/random_data.h"
#include "ops/measure/timing.h"

namespace dsfp4::ops::measure {
namespace {

// As in the engine: a batch of sequences decodes, longer runs of tokens are prompts.
Phase phase_of(std::int64_t tokens) { return tokens <= 16 ? Phase::kDecode : Phase::kPrefill; }

}  // namespace

KernelBench::KernelBench(std::unique_ptr<Ops> ops, int threads)
    : ops_(std::move(ops)), pool_(threads) {}

Seconds KernelBench::linear(format::WeightFormat format, std::int64_t rows, std::int64_t cols,
                            std::int64_t tokens, std::int64_t copies, int runs) {
  std::vector<format::EncodedMatrix> weights;
  weights.reserve(static_cast<std::size_t>(copies));
  for (std::int64_t i = 0; i < copies; ++i) {
    weights.push_back(random_weight(pool_, format, rows, cols, static_cast<std::uint64_t>(i)));
  }
  std::vector<float> x = random_floats(tokens * cols, 1);
  std::vector<float> y(static_cast<std::size_t>(tokens * rows));
  Seconds seconds;
  for (int run = -1; run < runs; ++run) {
    const auto& weight = weights[static_cast<std::size_t>(run + 1) % weights.size()];
    const double took = seconds_of([&] {
      ops_->linear(weight.view(), {x.data(), tokens, cols, cols}, {y.data(), tokens, rows, rows},
                   phase_of(tokens));
    });
    if (run >= 0) seconds.push_back(took);
  }
  return seconds;
}

Seconds KernelBench::experts(format::WeightFormat format, std::int64_t hidden,
                             std::int64_t intermediate, std::int64_t slots, std::int64_t tokens,
                             std::int64_t top_k, std::span<const std::int32_t> chosen, int runs) {
  std::vector<format::EncodedMatrix> matrices;
  std::vector<ExpertView> views;
  for (std::int64_t e = 0; e < slots; ++e) {
    const auto seed = static_cast<std::uint64_t>(3 * e);
    matrices.push_back(random_weight(pool_, format, intermediate, hidden, seed));
    matrices.push_back(random_weight(pool_, format, intermediate, hidden, seed + 1));
    matrices.push_back(random_weight(pool_, format, hidden, intermediate, seed + 2));
    const std::size_t last = matrices.size() - 1;
    views.push_back({matrices[last - 2].view(), matrices[last - 1].view(), matrices[last].view()});
  }
  const auto pair_count = static_cast<std::size_t>(tokens * top_k);
  std::vector<float> x = random_floats(tokens * hidden, 1);
  std::vector<float> scratch(pair_count * static_cast<std::size_t>(intermediate));
  std::vector<float> out(pair_count * static_cast<std::size_t>(hidden));
  Seconds seconds;
  for (int run = -1; run < runs; ++run) {
    std::map<std::int32_t, std::vector<std::int32_t>> pairs;
    const auto choice = chosen.subspan(static_cast<std::size_t>(run + 1) * pair_count, pair_count);
    for (std::size_t p = 0; p < pair_count; ++p) {
      pairs[choice[p]].push_back(static_cast<std::int32_t>(p));
    }
    std::vector<ExpertTask> tasks;
    tasks.reserve(pairs.size());
    for (const auto& [expert, own] : pairs) {
      tasks.push_back({&views[static_cast<std::size_t>(expert) % views.size()], own});
    }
    const double took = seconds_of([&] {
      ops_->experts(tasks, top_k, {x.data(), tokens, hidden, hidden},
                    {scratch.data(), tokens * top_k, intermediate, intermediate},
                    {out.data(), tokens * top_k, hidden, hidden}, phase_of(tokens));
    });
    if (run >= 0) seconds.push_back(took);
  }
  return seconds;
}

}  // namespace dsfp4::ops::measure
