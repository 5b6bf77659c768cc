#include "residency/prefetcher.h"

#include <algorithm>
#include <exception>
#include <utility>

#include "base/log.h"
#include "ops/scratch.h"

namespace dsfp4::residency {
namespace {

/// With so many (token, slot) pairs for each expert of a layer, next to all of them are chosen.
constexpr std::int64_t kPairsPerExpert = 8;

/// So many rows' predictions fit into the staging memory at least: of one token, many layers'.
constexpr std::int64_t kLeastRows = 64;

std::int64_t staged_rows(std::int64_t most_rows) {
  return std::clamp(most_rows, kLeastRows, kPredictedRows);
}

}  // namespace

Prefetcher::Prefetcher(ops::Ops& ops, ExpertStore& store, const ops::RouterSpec& router,
                       std::span<const RouterView> routers, std::int64_t most_rows,
                       Elsewhere elsewhere)
    : ops_(ops),
      store_(store),
      router_(router),
      routers_(routers),
      elsewhere_(std::move(elsewhere)),
      staging_(staging_bytes(most_rows, router.top_k), "the experts predicted",
               ops.device().staging()),
      choices_(memory::on_host(ops.device().staging(),
                               staging_.take(staging_.size()).as<std::int32_t>())),
      most_pairs_(staged_rows(most_rows) * router.top_k),
      there_(ops.device().make_event()) {}

Prefetcher::~Prefetcher() {
  try {
    ops_.device().wait_for(there_);
  } catch (const std::exception& error) {  // a device that has failed copies nothing any more
    log(LogLevel::kInfo, error.what());
  }
}

std::size_t Prefetcher::staging_bytes(std::int64_t most_rows, std::int64_t top_k) {
  const std::int64_t pairs = staged_rows(most_rows) * top_k;
  return memory::Arena::padded(static_cast<std::size_t>(pairs) * sizeof(std::int32_t));
}

void Prefetcher::expect(std::int64_t rows, ReadAhead& step) {
  step.named.clear();
  if (rows * router_.top_k < kPairsPerExpert * router_.experts) return;
  step.named = store_.most_valued(0);
  std::ranges::reverse(step.named);
  submit(step);
}

void Prefetcher::predict(std::int64_t moe_layer, const ExpertLayer& layer, std::int64_t ahead,
                         bool reads, memory::Arena& arena, ReadAhead& step) {
  step.named.clear();
  const std::int64_t rows = std::min(layer.x.rows, kPredictedRows);
  const ops::ConstMatrix x = layer.x.slice(layer.x.rows - rows, rows);
  const std::int64_t pairs = rows * router_.top_k;
  const std::int64_t left = static_cast<std::int64_t>(routers_.size()) - (moe_layer + 1);
  guess_ = {guess_.number + 1, moe_layer + 1, std::min({ahead, left, most_pairs_ / pairs}), rows,
            reads};
  step.guess = 0;
  if (guess_.layers <= 0) return;
  for (std::int64_t i = 0; i < guess_.layers; ++i) {
    const ops::ScratchScope scope(arena);
    const RouterView& router = routers_[static_cast<std::size_t>(guess_.first_layer + i)];
    const ops::Routing guess = ops::take_routing(arena, rows, router_);
    ops_.linear(router.gate, x, guess.logits, layer.phase, ops::Inputs::kF32);
    ops_.route(router_, guess.logits, router.bias, {}, guess);
    ops_.device().copy_out(ops::Queue::kCompute, guess.experts.data, choices_ + i * pairs,
                           guess.experts.size_bytes());
  }
  ops_.device().record(ops::Queue::kCompute, there_);
  step.guess = guess_.number;
  take(step);
  submit(step);
}

void Prefetcher::take(ReadAhead& step) {
  if (step.guess == 0) return;
  if (step.guess != guess_.number) {  // another step has asked since
    step.guess = 0;
    return;
  }
  if (!ops_.device().passed(there_)) return;
  step.guess = 0;
  const std::int64_t pairs = guess_.rows * router_.top_k;
  for (std::int64_t i = 0; i < guess_.layers; ++i) {
    std::vector<std::int32_t> experts = wanted(choices_ + i * pairs, guess_.rows);
    if (guess_.reads) name(guess_.first_layer + i, experts, step);
    if (i == 0) step.predicted = std::move(experts);
  }
}

// The experts of a choice, those that most rows want first.
std::vector<std::int32_t> Prefetcher::wanted(const std::int32_t* choice, std::int64_t rows) const {
  const std::int64_t pairs = rows * router_.top_k;
  // One row of many that wants an expert is not enough to read it.
  const std::int32_t least = 2 * pairs > router_.experts ? 2 : 1;
  std::vector<std::int32_t> wanted(static_cast<std::size_t>(router_.experts), 0);
  std::vector<std::int32_t> experts;
  experts.reserve(wanted.size());
  for (const std::int32_t e : std::span(choice, static_cast<std::size_t>(pairs))) {  // best first
    if (++wanted[static_cast<std::size_t>(e)] == least) experts.push_back(e);
  }
  std::ranges::stable_sort(experts, [&](std::int32_t a, std::int32_t b) {
    return wanted[static_cast<std::size_t>(a)] > wanted[static_cast<std::size_t>(b)];
  });
  return experts;
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
  while (!step.named.empty()) {
    const ExpertKey next = step.named.back();
    const bool is_elsewhere = elsewhere_ && elsewhere_(next);
    if (!is_elsewhere && store_.prefetch(next) == ExpertStore::Found::kNoRoom) return;
    step.named.pop_back();
  }
}

void Prefetcher::chosen(std::int64_t moe_layer, std::span<const ChosenExpert> chosen,
                        ReadAhead& step) {
  take(step);
  step.guess = 0;
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
  return ops::routing_bytes(std::min(tokens, kPredictedRows), shape.router);
}

}  // namespace dsfp4::residency
