#include "residency/prefetcher.h"

#include <algorithm>
#include <utility>

#include "ops/scratch.h"

namespace dsfp4::residency {
namespace {

/// With so many (token, slot) pairs for each expert of a layer, next to all of them are chosen.
constexpr std::int64_t kPairsPerExpert = 8;

}  // namespace

void Prefetcher::expect(std::int64_t rows, std::int64_t top_k, ReadAhead& step,
                        const std::function<bool(ExpertKey)>& elsewhere) {
  step.named.clear();
  if (rows * top_k < kPairsPerExpert * router_.experts) return;
  step.named = store_.most_valued(0);
  std::ranges::reverse(step.named);
  if (elsewhere) std::erase_if(step.named, elsewhere);
  submit(step);
}

void Prefetcher::predict(std::int64_t moe_layer, const ExpertLayer& layer, std::int64_t ahead,
                         memory::Arena& arena, ReadAhead& step) {
  step.named.clear();
  const auto layers = static_cast<std::int64_t>(routers_.size());
  const std::int64_t rows = layer.x.rows;
  // One row of many that wants an expert is not enough to read it.
  const std::int32_t least = 2 * rows * layer.top_k > router_.experts ? 2 : 1;
  for (std::int64_t next = moe_layer + 1; next <= moe_layer + ahead && next < layers; ++next) {
    const ops::ScratchScope scope(arena);
    const RouterView& router = routers_[static_cast<std::size_t>(next)];
    const ops::Routing guess = ops::take_routing(arena, rows, router_);
    ops_.linear(router.gate, layer.x, guess.logits, layer.phase, ops::Inputs::kF32);
    ops_.route(router_, guess.logits, router.bias, {}, guess);

    std::vector<std::int32_t> wanted(static_cast<std::size_t>(router_.experts), 0);
    std::vector<std::int32_t> experts;
    const std::int32_t* const own = ops_.device().on_host(guess.experts.data);
    for (const std::int32_t e : std::span(own, guess.experts.size)) {  // a row's best first
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
  return ops::routing_bytes(tokens, shape.router);
}

}  // namespace dsfp4::residency
