// Time to choose a token from the logits of a vocabulary of R1's size, in milliseconds.
//
//   dsfp4_bench_sampling [runs]
//
// Medians; logits are normal with a standard deviation of 2.5, a few likely ones on top.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <utility>
#include <vector>

#include "engine/sampler.h"

namespace {

using dsfp4::GenerateOptions;

constexpr std::size_t kVocab = 129280;

std::vector<float> make_logits() {
  std::mt19937 bits(0);
  std::normal_distribution<float> normal(0.0f, 2.5f);
  std::vector<float> logits(kVocab);
  for (float& logit : logits) logit = normal(bits);
  for (std::size_t i = 0; i < 8; ++i) logits[i * 9973] = 12.0f + static_cast<float>(i % 4);
  return logits;
}

template <typename Call>
double median_ms(int runs, const Call& call) {
  std::vector<double> times;
  for (int run = 0; run < runs; ++run) {
    const auto start = std::chrono::steady_clock::now();
    call();
    times.push_back(
        std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
            .count());
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

GenerateOptions options(double temperature, std::int64_t top_k, double top_p, double min_p,
                        double penalty = 1.0) {
  GenerateOptions made;
  made.temperature = temperature;
  made.top_k = top_k;
  made.top_p = top_p;
  made.min_p = min_p;
  made.repetition_penalty = penalty;
  return made;
}

}  // namespace

int main(int count, char** words) {
  const int runs = count > 1 ? std::max(1, std::atoi(words[1])) : 101;
  const std::vector<float> logits = make_logits();
  const std::pair<const char*, GenerateOptions> cases[] = {
      {"greedy", options(0.0, 0, 1.0, 0.0)},
      {"temperature 1", options(1.0, 0, 1.0, 0.0)},
      {"temperature 0.6, top_p 0.95", options(0.6, 0, 0.95, 0.0)},
      {"temperature 1, top_p 0.95", options(1.0, 0, 0.95, 0.0)},
      {"top_k 50", options(1.0, 50, 1.0, 0.0)},
      {"min_p 0.05", options(1.0, 0, 1.0, 0.05)},
      {"greedy, repetition penalty 1.1", options(0.0, 0, 1.0, 0.0, 1.1)},
  };
  for (const auto& [name, chosen] : cases) {
    dsfp4::engine::Sampler sampler(chosen, {}, static_cast<std::int64_t>(kVocab));
    std::printf("%-32s %.3f ms\n", name, median_ms(runs, [&] { sampler.sample(logits); }));
  }
  std::printf("%-32s %.3f ms\n", "logprobs 20",
              median_ms(runs, [&] { dsfp4::engine::token_logprobs(logits, 0, 20); }));
}
