#include <algorithm>
#include <atomic>

#include "ops/cpu/peak.h"
#include "ops/measure/kernel_bench.h"
#include "ops/measure/random_data.h"
#include "ops/measure/timing.h"

namespace dsfp4::ops::measure {
namespace {

using Line = std::uint64_t __attribute__((vector_size(64), aligned(1), may_alias));

// The sum of all words, by lines; four independent ones, as one addition waits for the one before.
// Lines are prefetched `ahead` bytes before their use, where that is not 0.
std::uint64_t sum_of(const std::byte* from, std::int64_t bytes, std::int64_t ahead) {
  Line sums[4] = {};
  for (std::int64_t i = 0; i + 256 <= bytes; i += 256) {
    for (int k = 0; k < 4; ++k) {
      const std::byte* const line = from + i + 64 * k;
      if (ahead != 0 && i + ahead + 256 <= bytes) __builtin_prefetch(line + ahead);
      sums[k] += *reinterpret_cast<const Line*>(line);
    }
  }
  const Line total = sums[0] + sums[1] + sums[2] + sums[3];
  std::uint64_t sum = 0;
  for (int i = 0; i < 8; ++i) sum += total[i];
  return sum;
}

}  // namespace

Seconds KernelBench::read_memory(std::size_t bytes, int runs) {
  constexpr std::int64_t kPiece = std::int64_t{1} << 20;
  // What is fastest depends on the processor's own prefetchers and on how many threads share them.
  constexpr std::int64_t kAhead[] = {0, 1024, 4096, 16384};
  const auto memory =
      random_weight(pool_, format::WeightFormat::kFp8Block, 1, static_cast<std::int64_t>(bytes), 1);
  std::atomic<std::uint64_t> sink{0};
  Seconds best;
  for (const std::int64_t ahead : kAhead) {
    Seconds seconds;
    for (int run = -1; run < runs; ++run) {
      const double took = seconds_of([&] {
        pool_.parallel_for(static_cast<std::int64_t>(bytes), kPiece,
                           [&](std::int64_t begin, std::int64_t end) {
                             sink.fetch_xor(sum_of(memory.data.data() + begin, end - begin, ahead),
                                            std::memory_order_relaxed);
                           });
      });
      if (run >= 0) seconds.push_back(took);
    }
    std::sort(seconds.begin(), seconds.end());
    if (best.empty() || seconds[seconds.size() / 2] < best[best.size() / 2]) best = seconds;
  }
  return best;
}

std::map<std::string, std::pair<std::string, double>> KernelBench::peaks() {
  constexpr std::int64_t kSteps = 4'000'000;  // some ten milliseconds
  std::map<std::string, std::pair<std::string, double>> rates;
  for (const cpu::PeakLoop& loop : cpu::peak_loops()) {
    double best = 0.0;
    for (int run = 0; run < 5; ++run) {
      std::atomic<double> flops{0.0};
      const double took = seconds_of([&] {
        pool_.parallel_for(pool_.size(), 1, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t i = begin; i < end; ++i) {
            float sink = 0.25f;
            flops.fetch_add(loop.run(kSteps, &sink) + (sink == 1234.5f ? 1.0 : 0.0));
          }
        });
      });
      best = std::max(best, flops.load() / took);
    }
    rates.emplace(loop.name, std::pair(std::string(loop.isa), best));
  }
  return rates;
}

}  // namespace dsfp4::ops::measure
