#include "residency/prefetcher.h"

#include <algorithm>
#include <utility>

#include "ops/scratch.h"

namespace dsfp4::residency {
namespace {

/// With so many (token, slot) pairs for each expert of a layer, next to all of them are chosen.
constexpr std::int64_t kPairsPerExpert = 8;

}  // namespace

void Prefetcher::expect(std::int64_t rows, std::int64_t top_k, ReadAhead& step) {
  step.named.clear();
  if (rows * top_k < kPairsPerExpert * router_.experts) return;
  step.named = store_.most_valued(0);
  std::ranges::reverse(step.named);
  submit(step);
}

void Prefetcher::predict(std::int64_t moe_layer, ops::ConstMatrix x, std::int64_t top_k,
                         std::int64_t ahead, memory::Arena& arena, ReadAhead& step) {
  step.named.clear();
  const auto layers = static_cast<std::int64_t>(routers_.size());
  const auto pairs = static_cast<std::size_t>(x.rows * top_k);
  // One row of many that wants an expert is not enough to read it.
  const std::int32_t least = x.rows > kDecodeRows ? 2 : 1;
  for (std::int64_t next = moe_layer + 1; next <= moe_layer + ahead && next < layers; ++next) {
    const ops::ScratchScope scope(arena);
    const auto ints = [&] { return std::span(arena.take_array<std::int32_t>(pairs), pairs); };
    const RouterView& router = routers_[static_cast<std::size_t>(next)];
    const ops::Matrix logits = ops::scratch_matrix(arena, x.rows, router_.experts);
    backend_.linear(router.gate, x, logits, ops::Inputs::kF32);
    const ops::Routing guess{ints(), ints(), std::span(arena.take_array<float>(pairs), pairs), {}};
    backend_.route(router_, logits, router.bias, {}, guess);

    std::vector<std::int32_t> wanted(static_cast<std::size_t>(router_.experts), 0);
    std::vector<std::int32_t> experts;
    for (const std::int32_t e : guess.experts) {  // a row's best first
      if (++wanted[static_cast<std::size_t>(e)] == least) experts.push_back(e);
    }
    std::ranges::stable_sort(experts, [&](std::int32_t a, std::int32_t b) {
      return wanted[static_cast<std::size_t>(a)] > wanted[static_cast<std::size_t>(b)];
    });
    name(next, experts, step);
    if (next == moe_layer + 1) step.predicted = std::move(experts);
  }
  submit(step);
}

void Prefetcher::name(std::int64_t moe_layer, std::span<const std::int32_t> experts,
                      ReadAhead& step) const {
  std::vector<ExpertKey> keys(experts.size());
  std::ranges::transform(experts, keys.rbegin(), [&](std::int32_t e) {
    return static_cast<ExpertKey>(moe_layer * router_.experts + e);
  });
  step.named.insert(step.named.begin(), keys.begin(), keys.end());
}

void Prefetcher::submit(ReadAhead& step) {
  while (!step.named.empty() && store_.prefetch(step.named.back()) != ExpertStore::Found::kNoRoom) {
    step.named.pop_back();
  }
}

void Prefetcher::chosen(std::int64_t moe_layer, std::span<const ChosenExpert> chosen,
                        ReadAhead& step) {
  const auto first = static_cast<ExpertKey>(moe_layer * router_.experts);
  std::erase_if(step.named, [&](ExpertKey key) {
    return key >= first && key < first + static_cast<ExpertKey>(router_.experts);
  });
  const std::vector<std::int32_t> predicted = std::exchange(step.predicted, {});
  if (predicted.empty()) return;
  stats_.predicted += predicted.size();
  stats_.chosen += chosen.size();
  for (const ChosenExpert& expert : chosen) {
    if (std::ranges::find(predicted, expert.expert) != predicted.end()) ++stats_.predicted_used;
  }
}

std::size_t Prefetcher::scratch_bytes(const MoeShape& shape, std::int64_t tokens) {
  return 3 * ops::scratch_bytes(tokens * shape.top_k) + ops::scratch_bytes(tokens * shape.experts);
}

}  // namespace dsfp4::residency
