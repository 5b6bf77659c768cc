// The work of one layer whose experts lie in VRAM, RAM and files.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <utility>

#include "base/poll.h"
#include "ops/mlp.h"
#include "ops/scratch.h"
#include "residency/tiered_experts.h"

namespace dsfp4::residency {
namespace {

constexpr std::chrono::milliseconds kSoon{1};
/// Experts of a prompt that are computed together.
constexpr std::size_t kPromptGroup = 4;
/// The last rows of a prompt tell what experts are worth: what was before them has faded.
constexpr std::int64_t kNotedRows = 512;
/// Of these, as many as are noted while a group of experts is copied and computed.
constexpr std::int64_t kNotedAtOnce = 64;

}  // namespace

// One layer's experts: which of them are pinned, and what is computed already.
class TieredExperts::Work final : public ExpertWork {
 public:
  Work(TieredExperts& runner, const ExpertLayer& layer, memory::Arena& arena, ReadAhead& ahead)
      : runner_(runner),
        store_(runner.store_),
        layer_(layer),
        moe_layer_(layer.layer - runner.first_layer_),
        arena_(arena),
        scope_(arena),
        ahead_(ahead),
        streams_(layer.phase == ops::Phase::kPrefill && layer.on_host.x.rows == 0),
        noted_(streams_ ? std::max<std::int64_t>(0, layer.x.rows - kNotedRows) : 0),
        device_(runner.device_),
        order_(layer.on_host.used.size()),
        chosen_(group_by_expert(layer.on_host.used, order_)) {
    for (auto* list : {&in_vram_, &ready_, &reading_, &missing_}) list->reserve(chosen_.size());
  }
  // A GPU may still read: pins of experts that are being copied are the tier's, its slots go to
  // events, and scratch is written behind the ops that read it.
  ~Work() override {
    for (const auto* list : {&ready_, &reading_}) {
      for (const std::size_t i : *list) store_.unpin(key(i));
    }
  }

  // Everything but the experts' own arithmetic, reads first.
  void begin() {
    runner_.stats_.total_pairs += order_.size();
    runner_.prefetcher_.chosen(moe_layer_, chosen_, ahead_);
    if (device_ != nullptr) {
      device_->reach_layer();
      device_->reap();
      if (streams_) device_->end_ahead();
    }
    find();
    std::vector<std::int32_t> left_out;
    if (runner_.options_.expert_threshold > 0.0f) left_out = leave_out();
    leave_a_slot();
    fetch();
    store_.drop_speculation(moe_layer_);
    if (!streams_) note_use(layer_.x.rows);
    predict();
    shared_into(layer_, runner_.ops_, arena_);

    const std::int64_t held = pairs_held(layer_.x.rows, layer_.top_k, layer_.phase);
    hidden_ = ops::scratch_matrix(arena_, held, runner_.moe_intermediate_size_);
    routed_ = ops::scratch_matrix(arena_, held, runner_.hidden_size_);
    if (streams_) return;
    if (device_ != nullptr) {
      compute_in_vram(in_vram_);
      in_vram_.clear();
      device_->end_ahead();
    }
    for (const std::int32_t pair : left_out) runner_.ops_.zero(routed_.slice(pair, 1));
  }

  bool advance() override {
    if (over_) return false;
    if (device_ != nullptr) device_->reap();
    runner_.prefetcher_.take(ahead_);
    if (missing_.empty()) runner_.prefetcher_.submit(ahead_);
    Group group;
    if (runner_.overlaps_reads_ || reading_.empty()) group = next_group();
    if (!group.experts.empty()) {
      compute(group);
      collect({});
      fetch();
      note_use(kNotedAtOnce);
    } else if (!reading_.empty()) {
      // One on its way back from VRAM is here soon, and only this thread finds out.
      collect(device_ != nullptr && device_->takes_back() ? kSoon : kPollPeriod);
      fetch();
    } else if (!missing_.empty()) {
      if (copying() > 0) {
        device_->wait_for_one();
        fetch();
      } else {
        make_room();
      }
    }
    if (!in_vram_.empty() || !ready_.empty() || !reading_.empty() || !missing_.empty()) return true;
    note_use(layer_.x.rows);
    store_.trim();
    if (!streams_) runner_.ops_.combine(routed_, layer_.routing.weights, layer_.top_k, layer_.y);
    if (device_ != nullptr && !streams_) copy_ahead();
    over_ = true;
    return false;
  }

 private:
  ExpertKey key(std::size_t i) const {
    return static_cast<ExpertKey>(moe_layer_ * runner_.router_.experts + chosen_[i].expert);
  }
  bool keep() const { return !streams_ || store_.cache_room() > 0; }
  std::size_t most_pins() const { return std::max<std::size_t>(2, store_.options().slots) - 1; }
  std::size_t copying() const { return device_ != nullptr ? device_->copying() : 0; }
  std::size_t pins() const { return ready_.size() + reading_.size() + copying(); }
  DeviceTier::Target target() const { return {&layer_, hidden_, routed_, streams_}; }
  // A prompt's may have to wait for their turn: one that only passes by is not there until then.
  bool in_vram(std::size_t i) const {
    if (device_ == nullptr) return false;
    return streams_ ? device_->experts().is_cached(key(i)) : device_->experts().has(key(i));
  }
  void miss(std::size_t i) { missing_.insert(std::ranges::upper_bound(missing_, i), i); }

  // Pins what is in RAM; what is in no memory is left in missing_.
  void find() {
    for (std::size_t i = 0; i < chosen_.size(); ++i) {
      if (in_vram(i)) {
        in_vram_.push_back(i);
        continue;
      }
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

  // If every slot is pinned, one is enough to let another step go on.
  void leave_a_slot() {
    if (streams_) return unpin_beyond(most_pins() - std::min(most_pins(), copying()));
    while (pins() > most_pins() && !(ready_.empty() && reading_.empty())) {
      std::vector<std::size_t>& list = reading_.empty() ? ready_ : reading_;
      store_.unpin(key(list.back()));
      miss(list.back());
      list.pop_back();
    }
  }

  // Pins only what is among the first `count` of those that are not in VRAM, so that a prompt's
  // next one always gets a slot.
  void unpin_beyond(std::size_t count) {
    std::vector<std::size_t> left(missing_);
    for (const auto* list : {&ready_, &reading_})
      left.insert(left.end(), list->begin(), list->end());
    if (left.size() <= count) return;
    std::ranges::sort(left);
    for (auto* list : {&ready_, &reading_}) {
      std::erase_if(*list, [&, end = left[count]](std::size_t i) {
        if (i < end) return false;
        store_.unpin(key(i));
        miss(i);
        return true;
      });
    }
  }

  std::vector<std::int32_t> leave_out();

  // Tells the policy of the next rows, at most so many.
  void note_use(std::int64_t rows) {
    const std::int64_t end = std::min(layer_.x.rows, noted_ + rows);
    if (noted_ == end) return;
    runner_.note_use(moe_layer_, layer_, noted_, end);
    noted_ = end;
    if (device_ != nullptr) device_->experts().revalue();
  }

  // Submits reads of missing experts, as many as there are slots for.
  void fetch() {
    std::size_t done = 0;
    while (done < missing_.size() && pins() < most_pins() &&
           store_.fetch(key(missing_[done]), keep()) != ExpertStore::Found::kNoRoom) {
      reading_.push_back(missing_[done++]);  // ready or not: collect() finds out
    }
    missing_.erase(missing_.begin(), missing_.begin() + static_cast<std::ptrdiff_t>(done));
    if (missing_.empty()) runner_.prefetcher_.submit(ahead_);
  }

  // Cancelled speculation still holds the slots, or another step does, or what a prompt has pinned
  // though it comes later.
  void make_room() {
    fetch();
    if (!reading_.empty() || store_.wait_for_room()) return;
    // The rest is cached. One of these goes, as there is no other way on.
    if (store_.fetch(key(missing_.front()), true) == ExpertStore::Found::kNoRoom) {
      if (!ready_.empty()) unpin_beyond(missing_.size() + ready_.size() - 1);
      return;
    }
    reading_.push_back(missing_.front());
    missing_.erase(missing_.begin());
  }

  struct Group {
    std::vector<std::size_t> experts;
    bool in_vram = false;
  };

  // All that are ready; of a prompt a few that follow each other from the next on and lie in one
  // memory.
  Group next_group() {
    if (!streams_) return {ready_};
    Group group;
    for (std::size_t i = next_; i < chosen_.size() && group.experts.size() < kPromptGroup; ++i) {
      if (chosen_[i].pairs.empty()) continue;  // left out
      const bool there = std::ranges::binary_search(in_vram_, i);
      if (there && !in_vram(i)) {  // it had to go: it is read as others are, and before them
        if (!group.experts.empty()) break;
        std::erase(in_vram_, i);
        miss(i);
        unpin_beyond(0);
        break;
      }
      if (!there && std::ranges::find(ready_, i) == ready_.end()) break;
      if (!group.experts.empty() && there != group.in_vram) break;
      group.in_vram = there;
      group.experts.push_back(i);
    }
    return group;
  }

  void compute(const Group& group) {
    if (device_ != nullptr && group.in_vram) {
      compute_in_vram(group.experts);
    } else {
      compute_ready(group.experts);
    }
    const auto is_done = [&](std::size_t i) {
      return std::ranges::find(group.experts, i) != group.experts.end();
    };
    std::erase_if(in_vram_, is_done);
    next_ = group.experts.back() + 1;
  }

  std::vector<DeviceTier::Job> jobs_of(std::span<const std::size_t> experts) {
    std::vector<DeviceTier::Job> jobs;
    jobs.reserve(experts.size());
    for (const std::size_t i : experts) {
      jobs.push_back({key(i), chosen_[i].pairs});
      runner_.stats_.used_bytes += store_.image_bytes(key(i));
    }
    return jobs;
  }

  void compute_in_vram(std::span<const std::size_t> experts) {
    device_->compute_cached(jobs_of(experts), target());
  }

  void compute_ready(std::span<const std::size_t> experts) {
    const auto start = Trace::Clock::now();
    const std::vector<DeviceTier::Job> jobs = jobs_of(experts);
    std::vector<ExpertKey> keys(jobs.size());
    std::ranges::transform(jobs, keys.begin(), &DeviceTier::Job::key);
    store_.check(keys);
    const auto done = [&] {
      std::erase_if(ready_,
                    [&](std::size_t i) { return std::ranges::find(experts, i) != experts.end(); });
    };
    if (device_ != nullptr) {
      done();  // the tier has the pins from here on
      device_->compute(jobs, target(), !streams_ || device_->experts().cache_room() > 0);
    } else {
      compute_where_they_lie(jobs);
      for (const ExpertKey pinned : keys) store_.unpin(pinned);
      done();
    }
    runner_.stats_.compute_seconds += span(Trace::Track::kCompute, jobs.size(), start);
  }

  void compute_where_they_lie(std::span<const DeviceTier::Job> jobs) {
    std::vector<ops::ExpertView> views;
    std::vector<ops::ExpertTask> tasks;
    views.reserve(jobs.size());
    for (const DeviceTier::Job& job : jobs) {
      views.push_back(store_.view(job.key));
      tasks.push_back({&views.back(), job.pairs});
    }
    if (streams_) {
      runner_.ops_.add_experts(tasks, layer_.routing.weights, layer_.top_k, layer_.x, hidden_,
                               routed_, layer_.y, layer_.phase);
    } else {
      runner_.ops_.experts(tasks, layer_.top_k, layer_.x, hidden_, routed_, layer_.phase);
    }
  }

  // A prediction may pay for copies alone.
  void predict() {
    const std::int64_t layers = runner_.layers_ahead(layer_.phase);
    const bool for_copies = device_ != nullptr && !streams_ && !runner_.options_.prefetch_layers &&
                            device_->has_time_ahead();
    runner_.prefetcher_.predict(moe_layer_, layer_, for_copies && layers == 0 ? 1 : layers,
                                layers > 0, arena_, ahead_);
  }

  void copy_ahead() {
    std::vector<ExpertKey> likely(ahead_.predicted.size());
    std::ranges::transform(ahead_.predicted, likely.begin(), [&](std::int32_t e) {
      return static_cast<ExpertKey>((moe_layer_ + 1) * runner_.router_.experts + e);
    });
    device_->copy_ahead(likely);
  }

  // Moves what has arrived to the ready ones, after waiting for the first for at most `wait`.
  void collect(std::chrono::milliseconds wait) {
    if (reading_.empty()) return;
    std::vector<ExpertKey> keys(reading_.size());
    std::ranges::transform(reading_, keys.begin(), [&](std::size_t i) { return key(i); });
    const auto start = Trace::Clock::now();
    const std::vector<ExpertKey> arrived = store_.ready_of(keys, wait);
    if (wait.count() > 0) {
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
      std::snprintf(name, sizeof(name), "layer %lld experts %zu",
                    static_cast<long long>(layer_.layer), experts);
      runner_.trace_->span(track, name, start, end);
    }
    return std::chrono::duration<double>(end - start).count();
  }

  TieredExperts& runner_;
  ExpertStore& store_;
  const ExpertLayer layer_;
  std::int64_t moe_layer_;
  memory::Arena& arena_;
  const ops::ScratchScope scope_;
  ReadAhead& ahead_;
  // A prompt's experts are added at once. A short one that the processor helps with is like
  // decoding.
  bool streams_;
  std::int64_t noted_;  // rows that the policy has been told of, or never will be
  DeviceTier* device_;
  bool over_ = false;
  ops::Matrix hidden_, routed_;
  std::vector<std::int32_t> order_;  // pairs, by expert
  std::vector<ChosenExpert> chosen_;
  std::size_t next_ = 0;  // of a prompt's: all before are computed
  // Indices into chosen_, those of in_vram_ and missing_ ascending; ready_ and reading_ are pinned.
  std::vector<std::size_t> in_vram_, ready_, reading_, missing_;
};

std::unique_ptr<ExpertWork> TieredExperts::start(const ExpertLayer& layer, memory::Arena& arena,
                                                 ReadAhead& ahead) {
  auto work = std::make_unique<Work>(*this, layer, arena, ahead);
  work->begin();
  return work;
}

// Takes light pairs out of the missing experts and of the weights; returns them.
std::vector<std::int32_t> TieredExperts::Work::leave_out() {
  const ops::HostRouting& routing = layer_.on_host;
  const auto slots = static_cast<std::size_t>(layer_.top_k);
  const float threshold = runner_.options_.expert_threshold;
  std::vector<bool> missing(routing.used.size(), false);
  for (const std::size_t i : missing_) {
    for (const std::int32_t pair : chosen_[i].pairs) missing[static_cast<std::size_t>(pair)] = true;
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
      if (k == best || !missing[first + k] || weights[k] >= threshold * sum) {
        continue;
      }
      left_out.push_back(static_cast<std::int32_t>(first + k));
      kept -= weights[k];
      weights[k] = 0.0f;
      ++runner_.stats_.skipped_pairs;
    }
    if (kept < sum) {
      for (float& weight : weights) weight *= sum / kept;
    }
  }
  if (left_out.empty()) return left_out;
  runner_.ops_.device().upload(routing.weights.data(), layer_.routing.weights.data,
                               routing.weights.size_bytes());
  std::erase_if(missing_, [&](std::size_t i) {
    ChosenExpert& expert = chosen_[i];
    const auto end = std::remove_if(expert.pairs.begin(), expert.pairs.end(), [&](std::int32_t p) {
      return std::ranges::binary_search(left_out, p);
    });
    expert.pairs = expert.pairs.first(static_cast<std::size_t>(end - expert.pairs.begin()));
    return expert.pairs.empty();
  });
  return left_out;
}

}  // namespace dsfp4::residency
