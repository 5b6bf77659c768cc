#include "residency/device_tier.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>

#include "base/log.h"
#include "base/seconds.h"
#include "ops/scratch.h"
#include "residency/plan.h"

namespace dsfp4::residency {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kMeasuredCopies = 3;
/// Calls without the processor after which it is tried again.
constexpr int kLongIdle = 64;
/// Experts that are computed together once they have been copied: half of the ring, so that others
/// are copied meanwhile.
constexpr std::size_t kTogether = kDeviceRing / 2;
/// Experts that are copied ahead; more would take slots of the ring from those that are needed.
constexpr std::size_t kMostAhead = 2;
/// Experts of a layer that are copied to VRAM though the processor computed them: with uses spread
/// evenly each would take another's place for nothing, and its copies take the memory's time.
constexpr int kMostPromotions = 1;
/// How much the newest measurement counts.
constexpr double kNewest = 0.2;

}  // namespace

DeviceTier::DeviceTier(ops::Ops& ops, ops::Ops& host, DeviceExperts& experts, ExpertStore& store,
                       const Shape& shape, DeviceTrace* trace)
    : ops_(ops),
      host_(host),
      experts_(experts),
      store_(store),
      shape_(shape),
      trace_(trace),
      staging_(staging_bytes(shape), "the processor's part of the experts", ops.device().staging()),
      rows_copied_(ops.device().make_event()) {
  const std::int64_t pairs = ops::kMostHostRows * shape.top_k;
  host_hidden_ = ops::scratch_matrix(staging_, pairs, shape.moe_intermediate_size);
  host_routed_ = ops::scratch_matrix(staging_, pairs, shape.hidden_size);
  copying_.reserve(store.options().slots);
  brought_.reserve(kTogether);
  tasks_.reserve(kTogether);
  ahead_.reserve(kMostAhead);
}

DeviceTier::~DeviceTier() {
  try {
    settle();
  } catch (const std::exception& error) {  // the pins are given back all the same
    log(LogLevel::kInfo, error.what());
  }
}

std::size_t DeviceTier::staging_bytes(const Shape& shape) {
  const std::int64_t pairs = ops::kMostHostRows * shape.top_k;
  return ops::scratch_bytes(pairs * shape.moe_intermediate_size) +
         ops::scratch_bytes(pairs * shape.hidden_size);
}

void DeviceTier::start_rates(double copy, double host) {
  copy_rate_ = copy;
  host_rate_ = host;
  if (copy > 0.0) measured_copies_ = kMeasuredCopies;
}

// Its results are not added at once, so there has to be scratch for all.
bool DeviceTier::uses_host(std::int64_t rows) const {
  const std::int64_t pairs = rows * shape_.top_k;
  return rows <= ops::kMostHostRows && share_ != 0.0 &&
         ops::added_pairs(rows, shape_.top_k) == pairs;
}

void DeviceTier::compute_cached(std::span<const Job> jobs, const Target& target) {
  if (jobs.empty()) return;
  std::vector<ops::ExpertTask> tasks;
  tasks.reserve(jobs.size());
  const auto release = [&] {
    for (const Job& job : jobs.first(tasks.size())) experts_.release(job.key);
  };
  try {
    for (const Job& job : jobs) tasks.push_back({experts_.find(job.key), job.pairs});
    run(tasks, target);
  } catch (...) {
    release();
    give_up();
    throw;
  }
  release();
}

void DeviceTier::run(std::span<const ops::ExpertTask> tasks, const Target& target) {
  const ExpertLayer& layer = *target.layer;
  if (trace_ != nullptr) trace_->begin_ops();
  if (target.adds) {
    ops_.add_experts(tasks, layer.routing.weights, layer.top_k, layer.x, target.hidden,
                     target.routed, layer.y, layer.phase);
  } else {
    ops_.experts(tasks, layer.top_k, layer.x, target.hidden, target.routed, layer.phase);
  }
  if (trace_ != nullptr) trace_->end_ops("layer " + std::to_string(layer.layer) + " experts");
  if (!overlaps_compute_) ops_.device().synchronize();
}

// The processor gets the first, which are worth least, and VRAM keeps the others.
std::vector<DeviceTier::Job> DeviceTier::by_worth(std::span<const Job> jobs) const {
  std::vector<ExpertKey> keys(jobs.size());
  std::ranges::transform(jobs, keys.begin(), &Job::key);
  std::vector<float> worth(jobs.size());
  store_.worth(keys, worth);
  std::vector<std::size_t> order(jobs.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::stable_sort(order, {}, [&](std::size_t i) { return worth[i]; });
  std::vector<Job> sorted(jobs.size());
  std::ranges::transform(order, sorted.begin(), [&](std::size_t i) { return jobs[i]; });
  return sorted;
}

void DeviceTier::compute(std::span<const Job> given, const Target& target, bool keep) {
  if (given.empty()) return;
  std::vector<Job> jobs;  // copied from the last to the first
  try {
    if (target.adds) {
      jobs.assign(given.rbegin(), given.rend());
    } else {
      jobs = by_worth(given);
    }
  } catch (...) {
    for (const Job& job : given) store_.unpin(job.key);
    throw;
  }
  std::uint64_t bytes = 0;
  for (const Job& job : jobs) bytes += store_.image_bytes(job.key);
  const ExpertLayer& layer = *target.layer;
  const bool may_use_host = layer.on_host.x.rows > 0;
  const std::size_t on_host = may_use_host ? host_jobs(jobs.size(), bytes) : 0;
  if (may_use_host) idle_host_ = on_host > 0 ? 0 : idle_host_ + 1;
  std::size_t held = jobs.size();  // the last of them have their pins in copying_
  const bool was_idle = copying_.empty();
  if (was_idle) queued_ = 0;
  const auto start = Clock::now();
  try {
    for (; held > on_host; --held) {
      if (tasks_.size() == kTogether) run_copied(target);
      copy(jobs[held - 1], target, keep);
    }
    run_copied(target);
    compute_on_host(std::span(jobs).first(held), target);
    reap();
    if (was_idle && held > 0) measure_copies(seconds_since(start));
    if (held > 0 && copying_.empty() && promote(jobs[held - 1].key)) --held;
  } catch (...) {
    release_copied();
    for (const Job& job : std::span(jobs).first(held)) store_.unpin(job.key);
    give_up();
    throw;
  }
  for (const Job& job : std::span(jobs).first(held)) store_.unpin(job.key);
}

// Queues the ops of what has been brought.
void DeviceTier::run_copied(const Target& target) {
  if (!tasks_.empty()) run(tasks_, target);
  release_copied();
}

void DeviceTier::release_copied() {
  for (const ExpertKey key : brought_) experts_.release(key);
  brought_.clear();
  tasks_.clear();
}

void DeviceTier::give_up() noexcept {
  bool whole = true;
  try {
    ops_.device().synchronize();
  } catch (const std::exception&) {
    experts_.drop_uncopied();
    whole = false;
  }
  for (const Copying& copy : copying_) store_.unpin(copy.key);
  copying_.clear();
  end_ahead();
  while (const auto key = experts_.drop_leaving()) store_.came_back(*key, whole);
}

// So that the later of both ends as early as possible.
std::size_t DeviceTier::host_jobs(std::size_t jobs, std::uint64_t bytes) {
  if (share_) {
    owed_ += *share_ * static_cast<double>(jobs);
    const std::size_t count = std::min(jobs, static_cast<std::size_t>(std::max(0.0, owed_ + 0.5)));
    owed_ -= static_cast<double>(count);
    return count;
  }
  // Rates change, and that of a side that does nothing stays unknown.
  if (copy_rate_ == 0.0 || host_rate_ == 0.0 || idle_host_ >= kLongIdle) return (jobs + 1) / 2;
  const double each = static_cast<double>(bytes) / static_cast<double>(jobs);
  const double copy = each / copy_rate_;
  const double compute = each / host_rate_;
  double backlog = 0.0;
  for (const Copying& copying : copying_) {
    backlog += static_cast<double>(copying.bytes) / copy_rate_;
  }
  std::size_t best = 0;
  double least = 0.0;
  for (std::size_t n = 0; n <= jobs; ++n) {
    const double copied = n == jobs ? 0.0 : backlog + static_cast<double>(jobs - n) * copy;
    const double end = std::max(static_cast<double>(n) * compute, copied);
    if (n == 0 || end < least) {
      least = end;
      best = n;
    }
  }
  return best;
}

// The queue was empty `seconds` ago, and queued_ bytes were put into it; the processor has computed
// since then. So this is the rate of copies while both are at work.
void DeviceTier::measure_copies(double seconds) {
  std::uint64_t left = 0;
  for (const Copying& copying : copying_) left += copying.bytes;
  const auto done = static_cast<double>(queued_ - left);
  if (done == 0.0 || seconds <= 0.0) return;
  if (copying_.empty()) {
    copy_rate_ = std::max(copy_rate_, done / seconds);
  } else {  // on average half of the next one is there, too
    const double rate = (done + 0.5 * static_cast<double>(copying_.front().bytes)) / seconds;
    copy_rate_ = copy_rate_ == 0.0 ? rate : copy_rate_ + kNewest * (rate - copy_rate_);
  }
}

void DeviceTier::compute_on_host(std::span<const Job> jobs, const Target& target) {
  if (jobs.empty()) return;
  const ExpertLayer& layer = *target.layer;
  std::vector<ops::ExpertView> views;
  std::vector<ops::ExpertTask> tasks;
  views.reserve(jobs.size());
  std::uint64_t bytes = 0;
  for (const Job& job : jobs) {
    views.push_back(store_.view(job.key));
    tasks.push_back({&views.back(), job.pairs});
    bytes += store_.image_bytes(job.key);
  }
  // Another step's rows may still be on their way; those of this step's layer before are not, as
  // its routing came behind them.
  if (rows_of_ != target.layer) ops_.device().wait_for(rows_copied_);
  rows_of_ = target.layer;
  const auto start = Clock::now();
  host_.experts(tasks, layer.top_k, layer.on_host.x, host_hidden_, host_routed_, layer.phase);
  const double seconds = seconds_since(start);
  for (const Job& job : jobs) {
    for (const std::int32_t pair : job.pairs) {
      ops_.device().copy_in(
          ops::Queue::kCompute, memory::on_host(ops_.device().staging(), host_routed_.row(pair)),
          target.routed.row(pair), static_cast<std::size_t>(shape_.hidden_size) * sizeof(float));
    }
  }
  ops_.device().record(ops::Queue::kCompute, rows_copied_);
  const double rate = static_cast<double>(bytes) / std::max(seconds, 1e-9);
  host_rate_ = host_rate_ == 0.0 ? rate : host_rate_ + kNewest * (rate - host_rate_);
  stats_.host_bytes += bytes;
  stats_.host_seconds += seconds;
}

void DeviceTier::copy(const Job& job, const Target& target, bool keep) {
  if (const ops::ExpertView* const there = experts_.find(job.key)) {  // another step has brought it
    brought_.push_back(job.key);
    tasks_.push_back({there, job.pairs});
    store_.unpin(job.key);
    return;
  }
  const std::uint64_t bytes = store_.image_bytes(job.key);
  const ops::HostExpertView from = store_.view(job.key);
  if (keep) keep = make_cache_room(job.key);
  const auto start = Clock::now();
  const ops::ExpertView* view = experts_.bring(job.key, from, keep);
  if (view == nullptr) {  // what was brought before has all slots
    run_copied(target);
    view = experts_.bring(job.key, from, keep);
  }
  if (view == nullptr) throw std::logic_error("no slot of VRAM is left for experts that pass by");
  brought_.push_back(job.key);
  tasks_.push_back({view, job.pairs});
  if (measured_copies_ < kMeasuredCopies) {
    ++measured_copies_;
    experts_.wait_copied(job.key);
    copy_rate_ =
        std::max(copy_rate_, static_cast<double>(bytes) / std::max(seconds_since(start), 1e-9));
  }
  copying_.push_back({job.key, bytes});
  queued_ += bytes;
  if (!overlaps_copies_) experts_.wait_copied(job.key);
}

// True where this expert may stay in VRAM now. Another that has to go for it is kept in RAM: there
// it is still, or is copied to, unless all in RAM is worth more.
bool DeviceTier::make_cache_room(ExpertKey key) {
  if (experts_.cache_room() > 0) return true;
  const std::optional<ExpertKey> victim = experts_.victim(key);
  if (!victim) return false;
  if (store_.take_back(*victim)) return true;
  if (!experts_.can_send_back(*victim)) return false;  // another time
  const std::optional<ExpertBytes> place = store_.make_room_for(*victim);
  if (!place) return true;  // it is worth less than all that is in RAM
  send_back(*victim, *place);
  return true;
}

void DeviceTier::send_back(ExpertKey key, const ExpertBytes& to) {
  try {
    experts_.send_back(key, to);
  } catch (...) {
    store_.came_back(key, false);
    throw;
  }
}

void DeviceTier::resize(std::size_t slots, std::size_t cache_slots, const Poll& poll) {
  settle();
  try {
    for (const ExpertKey key : experts_.going(slots, cache_slots)) {
      ask(poll);
      if (store_.take_back(key)) continue;
      if (!experts_.can_send_back(key)) {  // as many are on their way as may be
        experts_.wait_sent_back();
        take_returned();
      }
      if (const auto place = store_.make_room_for(key)) send_back(key, *place);
    }
  } catch (...) {
    give_up();
    throw;
  }
  settle();
  store_.trim();
  experts_.resize(slots, cache_slots);
}

// Copies an expert that is pinned in RAM to VRAM, to stay there, and takes the pin over.
bool DeviceTier::promote(ExpertKey key) {
  if (promotions_ == kMostPromotions || store_.cache_room() > 0 || experts_.has(key)) return false;
  if (!make_cache_room(key)) return false;
  ++promotions_;
  if (!experts_.bring_for_later(key, store_.view(key), true)) return false;
  experts_.release(key);
  copying_.push_back({key, store_.image_bytes(key)});
  queued_ += copying_.back().bytes;
  return true;
}

// An expert that is copied for nothing costs nothing then.
std::size_t DeviceTier::most_ahead() const {
  if (!overlaps_copies_) return 0;
  const auto bytes = static_cast<double>(store_.slot_size());
  return std::min(kMostAhead, static_cast<std::size_t>(gap_ * copy_rate_ / bytes));
}

void DeviceTier::copy_ahead(std::span<const ExpertKey> likely) {
  reap();
  if (!copying_.empty()) return;
  layer_ended_ = Clock::now();
  if (share_ && *share_ > 0.0) return;  // those in RAM are shared as the user says
  for (const ExpertKey key : likely) {
    if (ahead_.size() >= most_ahead()) return;
    if (experts_.has(key) || !store_.pin_if_ready(key)) continue;
    try {
      const ops::HostExpertView from = store_.view(key);
      // A copy that holds up this thread would be in the way of the next layer.
      const bool is_pinned = ops_.device().staging().is_pinned(from.gate_proj.data);
      if (!is_pinned || !experts_.bring_for_later(key, from, false)) {
        store_.unpin(key);
        return;
      }
    } catch (...) {
      store_.unpin(key);
      throw;
    }
    ahead_.push_back(key);
    copying_.push_back({key, store_.image_bytes(key)});
    ++stats_.copied_ahead;
  }
}

void DeviceTier::reach_layer() {
  promotions_ = 0;
  if (!layer_ended_) return;
  const double seconds = seconds_since(*layer_ended_);
  layer_ended_.reset();
  gap_ = gap_ == 0.0 ? seconds : gap_ + kNewest * (seconds - gap_);
}

void DeviceTier::end_ahead() {
  for (const ExpertKey key : ahead_) experts_.release(key);
  ahead_.clear();
}

void DeviceTier::take_returned() {
  while (const auto key = experts_.sent_back()) store_.came_back(*key, true);
}

void DeviceTier::reap() {
  std::size_t done = 0;  // copies are made in order
  const auto forget = [&] {
    copying_.erase(copying_.begin(), copying_.begin() + static_cast<std::ptrdiff_t>(done));
  };
  try {
    while (done < copying_.size() && experts_.copied(copying_[done].key)) {
      const ExpertKey key = copying_[done++].key;
      if (experts_.is_cached(key) && !store_.holds_all()) {
        store_.let_go(key);
      } else {
        store_.unpin(key);
      }
    }
    take_returned();
  } catch (...) {
    forget();
    give_up();
    throw;
  }
  forget();
}

void DeviceTier::settle() {
  end_ahead();
  while (!copying_.empty()) wait_for_one();
  try {
    ops_.device().synchronize();  // rows of the processor's, what was given up, and what goes back
    take_returned();
  } catch (...) {
    give_up();
    throw;
  }
}

void DeviceTier::wait_for_one() {
  if (copying_.empty()) return;
  try {
    experts_.wait_copied(copying_.front().key);
  } catch (...) {
    give_up();
    throw;
  }
  reap();
}

}  // namespace dsfp4::residency
