#include "residency/expert_store.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <string>
#include <utility>

#include "dsfp4/error.h"

namespace dsfp4::residency {

namespace {

/// The value of what was read ahead and not used yet.
constexpr float kUnused = -std::numeric_limits<float>::infinity();

std::size_t largest_slot(const std::vector<ExpertImage>& images) {
  std::size_t bytes = 0;
  for (const ExpertImage& image : images) {
    bytes = std::max<std::size_t>(bytes, image.files.slot_bytes);
  }
  return bytes;
}

}  // namespace

ExpertStore::ExpertStore(Options options, std::vector<ExpertImage> images, storage::Reader& reader,
                         std::unique_ptr<Policy> policy)
    : options_(std::move(options)),
      images_(std::move(images)),
      reader_(reader),
      policy_(std::move(policy)),
      link_(std::make_shared<Link>()),
      slots_(options_.slots),
      slot_of_(images_.size(), -1),
      queued_(options_.slots, false) {
  check_counts(options_.slots, options_.cache_slots);
  passing_.reserve(slots_.size());
  pool_ = std::make_shared<memory::SlotPool>(slots_.size(), largest_slot(images_),
                                             "the expert slots", *options_.memory);
  link_->store = this;
}

// A read may complete within cancel(), so this is done without the lock.
void ExpertStore::cancel(Lock& lock, const std::vector<storage::ReadTicket>& tickets) {
  lock.unlock();
  for (const storage::ReadTicket& ticket : tickets) reader_.cancel(ticket);
  lock.lock();
}

ExpertStore::Found ExpertStore::pin(ExpertKey key, bool keep) {
  const std::lock_guard lock(mutex_);
  return pin_locked(key, keep);
}

ExpertStore::Found ExpertStore::pin_locked(ExpertKey key, bool keep) {
  const int number = slot_of_[key];
  if (number < 0) return Found::kAbsent;
  Slot& slot = slots_[static_cast<std::size_t>(number)];
  if (slot.cancelled || (slot.state == State::kFailed && slot.pins == 0)) {
    slot_of_[key] = -1;  // the slot is taken back when the reader has let go of it
    slot.key = kNoKey;
    return Found::kAbsent;
  }
  if (slot.state == State::kReading && slot.ticket) reader_.promote(slot.ticket);
  if (slot.speculative) {
    ++stats_.prefetched;
    stats_.prefetched_bytes += image_bytes(key);
    slot.speculative = false;
  } else if (slot.state == State::kReady) {
    ++stats_.hits;
  } else {
    ++stats_.joined;
  }
  if (keep && !slot.keep) {
    slot.keep = true;
    ++cached_;
  }
  ++slot.pins;
  return slot.state == State::kReady ? Found::kReady : Found::kReading;
}

ExpertStore::Found ExpertStore::fetch(ExpertKey key, bool keep) {
  const std::lock_guard lock(mutex_);
  // Another thread may have begun to read it since pin().
  if (const Found found = pin_locked(key, keep); found != Found::kAbsent) return found;
  const int number = find_slot(keep ? kAny : kNone);
  if (number < 0) return Found::kNoRoom;
  read_into(number, key, storage::Priority::kDemand);
  Slot& slot = slots_[static_cast<std::size_t>(number)];
  slot.pins = 1;
  slot.keep = keep;
  if (keep) ++cached_;
  ++stats_.misses;
  stats_.demand_bytes += image_bytes(key);
  return Found::kReading;
}

void ExpertStore::unpin(ExpertKey key) {
  const std::lock_guard lock(mutex_);
  unpin_locked(key);
}

void ExpertStore::unpin_locked(ExpertKey key) {
  const int number = slot_of_[key];
  Slot& slot = slots_[static_cast<std::size_t>(number)];
  if (--slot.pins > 0) return;
  if (slot.state == State::kFailed) {
    slot_of_[key] = -1;
    forget(slot);
    slot.key = kNoKey;
  } else if (!slot.keep) {
    pass_by(number);
  }
}

std::vector<ExpertKey> ExpertStore::ready_of(std::span<const ExpertKey> pinned,
                                             std::chrono::milliseconds wait) {
  Lock lock(mutex_);
  const auto slot_of = [&](ExpertKey key) -> const Slot& {
    return slots_[static_cast<std::size_t>(slot_of_[key])];
  };
  const auto has_come = [&](ExpertKey key) { return slot_of(key).state != State::kReading; };
  if (wait.count() > 0) {
    arrival_.wait_for(lock, wait, [&] { return std::ranges::any_of(pinned, has_come); });
  }
  std::vector<ExpertKey> ready;
  for (const ExpertKey key : pinned) {
    const Slot& slot = slot_of(key);
    if (slot.state == State::kFailed) throw_failure(key, slot);
    if (slot.state == State::kReady) ready.push_back(key);
  }
  return ready;
}

bool ExpertStore::wait_for_room() {
  Lock lock(mutex_);
  throw_if_stalled("no room for another expert");
  const auto comes_back = [](const Slot& slot) {
    return slot.state == State::kReading || slot.state == State::kFailed;
  };
  if (std::ranges::none_of(slots_, comes_back)) return false;
  const int unread = unread_;
  // All may have ended by now; then the slots are there once the reader has let go of them.
  arrival_.wait_for(lock, kLookAgain, [&] { return unread_ < unread; });
  return true;
}

void ExpertStore::throw_failure(ExpertKey key, const Slot& slot) const {
  if (slot.error) std::rethrow_exception(slot.error);
  const storage::ReadResult& result = slot.result;
  const auto experts = static_cast<ExpertKey>(options_.experts);
  throw IoError(result.file, result.offset, result.error_number,
                "expert " + std::to_string(key % experts) + " of layer " +
                    std::to_string(options_.first_layer + key / experts) + ": " + result.problem);
}

void ExpertStore::worth(std::span<const ExpertKey> keys, std::span<float> worth) const {
  const std::lock_guard lock(mutex_);
  std::ranges::transform(keys, worth.begin(), [&](ExpertKey key) { return policy_->value(key); });
}

ops::HostExpertView ExpertStore::view(ExpertKey key) const {
  const std::lock_guard lock(mutex_);
  return view_locked(key);
}

ops::HostExpertView ExpertStore::view_locked(ExpertKey key) const {
  return images_[key].view_in(pool_->data(slot_of_[key]));
}

void ExpertStore::check(std::span<const ExpertKey> pinned) {
  if (!options_.check) return;
  std::vector<ExpertKey> keys;
  std::vector<ops::HostExpertView> views;
  const auto slot_of = [&](ExpertKey key) -> Slot& {
    return slots_[static_cast<std::size_t>(slot_of_[key])];
  };
  {
    const std::lock_guard lock(mutex_);
    for (const ExpertKey key : pinned) {
      if (slot_of(key).checked) continue;
      keys.push_back(key);
      views.push_back(view_locked(key));
    }
  }
  if (keys.empty()) return;
  try {
    options_.check(keys, views);
  } catch (...) {
    const std::lock_guard lock(mutex_);
    for (const ExpertKey key : keys) {
      slot_of(key).state = State::kFailed;
      slot_of(key).error = std::current_exception();
    }
    throw;
  }
  const std::lock_guard lock(mutex_);
  for (const ExpertKey key : keys) slot_of(key).checked = true;
}

// A slot that holds nothing worth keeping, or -1.
int ExpertStore::free_or_passing() {
  if (pool_->free_count() == 0) reclaim();
  if (const int number = pool_->acquire(); number >= 0) return number;
  while (!passing_.empty()) {
    const int number = passing_.front();
    passing_.erase(passing_.begin());
    queued_[static_cast<std::size_t>(number)] = false;
    const Slot& slot = slots_[static_cast<std::size_t>(number)];
    if (slot.state != State::kReady || slot.keep || slot.pins > 0 || slot.speculative) continue;
    slot_of_[slot.key] = -1;
    return number;
  }
  return -1;
}

// Slots of failed and cancelled reads, once the reader has let go of them.
void ExpertStore::reclaim() {
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    if (slot.state != State::kFailed || slot.pins > 0 || !slot.ticket.quiet()) continue;
    if (slot.key != kNoKey) slot_of_[slot.key] = -1;
    forget(slot);
    slot = Slot();
    pool_->release(static_cast<int>(i));
  }
}

// If there is nothing to wait for but reads that were given up and are with the system still.
void ExpertStore::throw_if_stalled(const char* problem) const {
  const storage::ReadResult* stalled = nullptr;
  for (const Slot& slot : slots_) {
    if (slot.state == State::kReading || slot.pins > 0) return;
    if (slot.state != State::kFailed) continue;
    if (slot.ticket.quiet() || slot.result.error_number != ETIMEDOUT) return;
    stalled = &slot.result;
  }
  if (stalled == nullptr) return;
  throw IoError(stalled->file, stalled->offset, ETIMEDOUT,
                std::string(problem) + ": the disk does not answer this read into an expert slot");
}

// Gives up a cached expert for it where one is worth less than `below`. -1: none is.
int ExpertStore::find_slot(float below) {
  const int number = free_or_passing();
  if (number >= 0) return number;
  int best = -1;
  float least = below;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const Slot& slot = slots_[i];
    if (slot.state != State::kReady || slot.pins > 0) continue;
    if (slot.speculative) {  // read ahead for nothing, or too early
      best = static_cast<int>(i);
      break;
    }
    const float value = policy_->value(slot.key);
    if (value < least) {
      best = static_cast<int>(i);
      least = value;
    }
  }
  if (best < 0) return -1;
  Slot& slot = slots_[static_cast<std::size_t>(best)];
  if (slot.keep) ++stats_.evictions;
  give_up_speculation(slot);
  slot_of_[slot.key] = -1;
  forget(slot);
  return best;
}

// The slot's content is no longer counted as cached.
void ExpertStore::forget(Slot& slot) noexcept {
  if (slot.keep) --cached_;
  slot.keep = false;
}

void ExpertStore::pass_by(int slot) {
  const auto place = static_cast<std::size_t>(slot);
  if (!queued_[place]) passing_.push_back(slot);
  queued_[place] = true;
}

void ExpertStore::read_into(int number, ExpertKey key, storage::Priority priority) {
  storage::ReadRequest request;
  request.priority = priority;
  request.owner = pool_;
  request.extents = images_[key].files.extents(pool_->data(number));
  request.on_complete = [link = link_, number](const storage::ReadResult& result) {
    const std::lock_guard lock(link->mutex);
    if (link->store != nullptr) link->store->arrived(number, result);
  };
  Slot& slot = slots_[static_cast<std::size_t>(number)];
  slot = Slot();
  slot.asked = Trace::Clock::now();
  try {
    slot.ticket = reader_.submit(std::move(request));
  } catch (...) {
    pool_->release(number);
    throw;
  }
  slot.state = State::kReading;
  slot.key = key;
  slot_of_[key] = number;
  ++unread_;
}

void ExpertStore::arrived(int number, const storage::ReadResult& result) noexcept {
  const std::lock_guard lock(mutex_);
  Slot& slot = slots_[static_cast<std::size_t>(number)];
  const bool done = result.status == storage::ReadStatus::kDone && !slot.cancelled;
  if (options_.trace != nullptr && slot.key != kNoKey) trace_read(slot);
  slot.state = done ? State::kReady : State::kFailed;
  if (slot.cancelled) stats_.wasted_bytes += slot.ticket.bytes_done();
  if (done && slot.pins == 0 && !slot.keep && !slot.speculative) pass_by(number);
  if (!done) {
    forget(slot);
    slot.cancelled = false;
    slot.speculative = false;
    try {
      slot.result = result;
    } catch (...) {  // no memory for the words: the error number is left
      slot.result.error_number = result.error_number;
    }
  }
  --unread_;
  arrival_.notify_all();
}

void ExpertStore::trace_read(const Slot& slot) const noexcept {
  const auto experts = static_cast<ExpertKey>(options_.experts);
  char name[48];
  std::snprintf(name, sizeof(name), "layer %u expert %u%s",
                static_cast<unsigned>(options_.first_layer) + slot.key / experts,
                slot.key % experts, slot.speculative ? " ahead" : "");
  options_.trace->span(Trace::Track::kReads, name, slot.asked, Trace::Clock::now(),
                       slot.ticket.bytes_done());
}

void ExpertStore::note_use(std::int64_t layer, std::span<const std::int32_t> experts,
                           std::span<const float> scores) {
  const std::lock_guard lock(mutex_);
  policy_->use(layer, experts, scores);
}

void ExpertStore::trim() {
  const std::lock_guard lock(mutex_);
  if (cached_ <= options_.cache_slots) return;
  std::vector<std::pair<float, int>> candidates;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const Slot& slot = slots_[i];
    if (slot.state == State::kReady && slot.keep && slot.pins == 0) {
      candidates.emplace_back(slot.speculative ? kUnused : policy_->value(slot.key),
                              static_cast<int>(i));
    }
  }
  const std::size_t surplus = std::min(cached_ - options_.cache_slots, candidates.size());
  std::ranges::partial_sort(candidates, candidates.begin() + static_cast<std::ptrdiff_t>(surplus));
  for (std::size_t i = 0; i < surplus; ++i) {
    Slot& slot = slots_[static_cast<std::size_t>(candidates[i].second)];
    forget(slot);
    give_up_speculation(slot);
    pass_by(candidates[i].second);
    ++stats_.evictions;
  }
}

std::size_t ExpertStore::cache_room() const {
  const std::lock_guard lock(mutex_);
  return options_.cache_slots - std::min(options_.cache_slots, cached_);
}

StoreStats ExpertStore::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

std::vector<float> ExpertStore::policy_state() const {
  const std::lock_guard lock(mutex_);
  return policy_->state();
}

bool ExpertStore::restore_policy(std::span<const float> state) {
  const std::lock_guard lock(mutex_);
  return policy_->restore(state);
}

bool ExpertStore::is_consistent() const {
  const std::lock_guard lock(mutex_);
  std::size_t cached = 0;
  std::size_t mapped = 0;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const Slot& slot = slots_[i];
    if (slot.pins != 0) return false;
    if (slot.keep) ++cached;
    if (slot.key != kNoKey && slot_of_[slot.key] == static_cast<int>(i)) ++mapped;
  }
  const auto present = std::ranges::count_if(slot_of_, [](int slot) { return slot >= 0; });
  return cached == cached_ && static_cast<std::size_t>(present) == mapped;
}

}  // namespace dsfp4::residency
