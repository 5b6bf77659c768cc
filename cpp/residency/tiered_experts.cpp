#include "residency/tiered_experts.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <utility>

#include "ops/mlp.h"
#include "ops/scratch.h"

namespace dsfp4::residency {
namespace {

/// Experts of a prompt that are computed together; between groups the caller may look up.
constexpr std::size_t kPromptGroup = 4;

}  // namespace

// One run(): its experts, which of them are pinned, and what is computed already.
class TieredExperts::Layer {
 public:
  Layer(TieredExperts& runner, std::int64_t moe_layer, ops::ConstMatrix x, std::int64_t top_k,
        std::vector<ChosenExpert> chosen)
      : runner_(runner),
        store_(runner.store_),
        layer_(moe_layer + runner.first_layer_),
        first_key_(static_cast<ExpertKey>(moe_layer * runner.router_.experts)),
        x_(x),
        top_k_(top_k),
        chosen_(std::move(chosen)),
        streams_(x.rows > kDecodeRows) {}
  ~Layer() {
    for (const auto* list : {&ready_, &reading_}) {
      for (const std::size_t i : *list) store_.unpin(key(i));
    }
  }
  Layer(const Layer&) = delete;
  Layer& operator=(const Layer&) = delete;

  const std::vector<ChosenExpert>& chosen() const { return chosen_; }

  // Pins what is there; what is not is left in missing().
  void find() {
    for (std::size_t i = 0; i < chosen_.size(); ++i) {
      if (chosen_[i].pairs.empty()) continue;
      switch (store_.pin(key(i), keep())) {
        case ExpertStore::Found::kReady:
          ready_.push_back(i);
          break;
        case ExpertStore::Found::kReading:
          reading_.push_back(i);
          break;
        default:
          missing_.push_back(i);
      }
    }
  }
  std::vector<std::size_t>& missing() { return missing_; }
  ChosenExpert& expert(std::size_t i) { return chosen_[i]; }

  // Submits reads of missing experts, as many as there are slots for.
  void fetch() {
    std::size_t done = 0;
    while (done < missing_.size() &&
           store_.fetch(key(missing_[done]), keep()) != ExpertStore::Found::kNoRoom) {
      reading_.push_back(missing_[done++]);  // ready or not: collect() finds out
    }
    missing_.erase(missing_.begin(), missing_.begin() + static_cast<std::ptrdiff_t>(done));
    if (missing_.empty()) runner_.prefetcher_.submit();
  }

  void compute_all(ops::Matrix hidden, ops::Matrix routed, const Poll& poll) {
    for (;;) {
      while (!ready_.empty()) {
        ask(poll);
        compute_group(hidden, routed);
        collect(false, {});
        fetch();
      }
      if (reading_.empty()) {
        if (missing_.empty()) return;
        fetch();
        if (reading_.empty()) {  // cancelled speculation still holds the slots
          store_.wait_for_room();
          ask(poll);
          continue;
        }
      }
      collect(true, poll);
    }
  }

 private:
  ExpertKey key(std::size_t i) const {
    return first_key_ + static_cast<ExpertKey>(chosen_[i].expert);
  }
  bool keep() const { return !streams_ || store_.cache_room() > 0; }

  void compute_group(ops::Matrix hidden, ops::Matrix routed) {
    const std::size_t count = streams_ ? std::min(kPromptGroup, ready_.size()) : ready_.size();
    std::vector<ExpertKey> keys;
    std::vector<ops::ExpertView> views;
    std::vector<ops::ExpertTask> tasks;
    views.reserve(count);
    for (std::size_t n = 0; n < count; ++n) {
      keys.push_back(key(ready_[n]));
      views.push_back(store_.view(keys.back()));
      tasks.push_back({&views.back(), chosen_[ready_[n]].pairs});
      runner_.stats_.used_bytes += store_.image_bytes(keys.back());
    }
    const auto start = Trace::Clock::now();
    store_.check(keys);
    runner_.backend_.experts(tasks, top_k_, x_, hidden, routed);
    runner_.stats_.compute_seconds += span(Trace::Track::kCompute, count, start);
    for (std::size_t n = 0; n < count; ++n) store_.unpin(key(ready_[n]));
    ready_.erase(ready_.begin(), ready_.begin() + static_cast<std::ptrdiff_t>(count));
  }

  // Moves what has arrived to the ready ones; waits for something if `wait`.
  void collect(bool wait, const Poll& poll) {
    if (reading_.empty()) return;
    std::vector<ExpertKey> keys(reading_.size());
    std::ranges::transform(reading_, keys.begin(), [&](std::size_t i) { return key(i); });
    const auto start = Trace::Clock::now();
    const std::vector<ExpertKey> arrived = store_.ready_of(keys, wait, poll);
    if (wait) {
      runner_.stats_.wait_seconds += span(Trace::Track::kWaits, arrived.size(), start);
    }
    std::erase_if(reading_, [&](std::size_t i) {
      if (std::ranges::find(arrived, key(i)) == arrived.end()) return false;
      ready_.push_back(i);
      return true;
    });
  }

  // The seconds since `start`, which become a span of the trace.
  double span(Trace::Track track, std::size_t experts, Trace::Clock::time_point start) const {
    const auto end = Trace::Clock::now();
    if (runner_.trace_ != nullptr) {
      char name[64];
      std::snprintf(name, sizeof(name), "layer %lld experts %zu", static_cast<long long>(layer_),
                    experts);
      runner_.trace_->span(track, name, start, end);
    }
    return std::chrono::duration<double>(end - start).count();
  }

  TieredExperts& runner_;
  ExpertStore& store_;
  std::int64_t layer_;  // the model's number
  ExpertKey first_key_;
  ops::ConstMatrix x_;
  std::int64_t top_k_;
  std::vector<ChosenExpert> chosen_;
  bool streams_;
  // Indices into chosen_; the first two are pinned.
  std::vector<std::size_t> ready_, reading_, missing_;
};

TieredExperts::TieredExperts(ops::Backend& backend, ExpertStore& store, ops::RouterSpec router,
                             std::vector<RouterView> routers, std::int64_t first_layer,
                             std::int64_t hidden_size, std::int64_t moe_intermediate_size,
                             Trace* trace)
    : backend_(backend),
      store_(store),
      router_(router),
      routers_(std::move(routers)),
      first_layer_(first_layer),
      hidden_size_(hidden_size),
      moe_intermediate_size_(moe_intermediate_size),
      trace_(trace),
      prefetcher_(backend, store, router_, routers_) {}

void TieredExperts::begin_step(std::int64_t rows) {
  if (layers_ahead(rows) > 0) prefetcher_.expect(rows, router_.top_k);
}

std::int64_t TieredExperts::layers_ahead(std::int64_t rows) const {
  return options_.prefetch_layers.value_or(rows > kDecodeRows || store_.cache_room() > 0 ? 1 : 0);
}

void TieredExperts::run(std::int64_t layer, ops::ConstMatrix x, const ops::Routing& routing,
                        std::int64_t top_k, memory::Arena& arena, ops::Matrix y,
                        const ops::ExpertView* shared, const Poll& poll) {
  const ops::ScratchScope scope(arena);
  const std::int64_t moe_layer = layer - first_layer_;
  const std::int64_t pairs = x.rows * top_k;
  const auto count = static_cast<std::size_t>(pairs);
  const std::span<std::int32_t> order(arena.take_array<std::int32_t>(count), count);

  Layer work(*this, moe_layer, x, top_k, group_by_expert(routing.used, order));
  stats_.total_pairs += count;
  prefetcher_.chosen(moe_layer, work.chosen());
  work.find();
  std::vector<std::int32_t> left_out;
  if (options_.expert_threshold > 0.0f) left_out = leave_out(work, routing, top_k);
  work.fetch();
  store_.drop_speculation(moe_layer);
  note_use(moe_layer, routing, x.rows, top_k);
  prefetcher_.predict(moe_layer, x, top_k, layers_ahead(x.rows), arena);
  shared_into(shared, backend_, arena, x, y);

  const ops::Matrix hidden = ops::scratch_matrix(arena, pairs, moe_intermediate_size_);
  const ops::Matrix routed = ops::scratch_matrix(arena, pairs, hidden_size_);
  for (const std::int32_t pair : left_out) std::fill_n(routed.row(pair), routed.cols, 0.0f);
  work.compute_all(hidden, routed, poll);
  store_.trim();
  backend_.combine(routed, routing.weights, top_k, y);
}

std::vector<std::int32_t> TieredExperts::leave_out(Layer& work, const ops::Routing& routing,
                                                   std::int64_t top_k) {
  const auto slots = static_cast<std::size_t>(top_k);
  std::vector<bool> missing(routing.used.size(), false);
  for (const std::size_t i : work.missing()) {
    for (const std::int32_t pair : work.expert(i).pairs) {
      missing[static_cast<std::size_t>(pair)] = true;
    }
  }
  // Which pairs go is decided token by token, then the experts that nobody is left for.
  std::vector<std::int32_t> left_out;  // ascending
  for (std::size_t first = 0; first < routing.used.size(); first += slots) {
    const std::span<float> weights = routing.weights.subspan(first, slots);
    const float sum = std::accumulate(weights.begin(), weights.end(), 0.0f);
    const auto best = static_cast<std::size_t>(std::ranges::max_element(weights) - weights.begin());
    float kept = sum;
    for (std::size_t k = 0; k < slots; ++k) {
      // The heaviest stays, so that there is something to give the weight to.
      if (k == best || !missing[first + k] || weights[k] >= options_.expert_threshold * sum) {
        continue;
      }
      left_out.push_back(static_cast<std::int32_t>(first + k));
      kept -= weights[k];
      weights[k] = 0.0f;
      ++stats_.skipped_pairs;
    }
    if (kept < sum) {
      for (float& weight : weights) weight *= sum / kept;
    }
  }
  std::erase_if(work.missing(), [&](std::size_t i) {
    ChosenExpert& expert = work.expert(i);
    const auto end = std::remove_if(expert.pairs.begin(), expert.pairs.end(), [&](std::int32_t p) {
      return std::ranges::binary_search(left_out, p);
    });
    expert.pairs = expert.pairs.first(static_cast<std::size_t>(end - expert.pairs.begin()));
    return expert.pairs.empty();
  });
  return left_out;
}

void TieredExperts::note_use(std::int64_t moe_layer, const ops::Routing& routing,
                             std::int64_t tokens, std::int64_t top_k) {
  const std::span<const float> bias = routers_[static_cast<std::size_t>(moe_layer)].bias;
  const auto width = static_cast<std::size_t>(router_.experts);
  std::vector<float> scores(width);
  for (std::int64_t t = 0; t < tokens; ++t) {
    const float* logits = routing.logits.row(t);
    selection_scores(router_.scoring, {logits, width}, bias, scores);
    store_.note_use(
        moe_layer,
        routing.used.subspan(static_cast<std::size_t>(t * top_k), static_cast<std::size_t>(top_k)),
        scores);
  }
}

std::size_t TieredExperts::scratch_bytes(const MoeShape& shape, std::int64_t tokens) {
  const std::int64_t pairs = tokens * shape.top_k;
  return ops::scratch_bytes(pairs) +
         std::max({Prefetcher::scratch_bytes(shape, tokens),
                   ops::mlp_scratch_bytes(shape.shared_intermediate_size, tokens),
                   ops::scratch_bytes(pairs * shape.moe_intermediate_size) +
                       ops::scratch_bytes(pairs * shape.hidden_size)});
}

}  // namespace dsfp4::residency
