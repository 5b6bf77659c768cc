// ExpertStore with another number of slots, and its end.
#include <algorithm>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "dsfp4/error.h"
#include "residency/expert_store.h"

namespace dsfp4::residency {

void ExpertStore::check_counts(std::size_t slots, std::size_t cache_slots) {
  if (slots == 0 || cache_slots >= slots) {
    throw ParameterError("prefetch_size", "must leave room for at least one expert to be read");
  }
}

ExpertStore::~ExpertStore() {
  {
    const std::lock_guard lock(link_->mutex);
    link_->store = nullptr;  // from here on nothing arrives
  }
  for (Slot& slot : slots_) {
    if (slot.state == State::kReading && slot.ticket) reader_.cancel(slot.ticket);
  }
  if (options_.memory == &memory::host_memory()) return;
  // A device's memory goes with the device, which a read that the disk does not answer may outlive:
  // then the slots stay for good.
  const auto quiet = [](const Slot& slot) {
    return slot.state == State::kFree || slot.state == State::kReady || slot.ticket.quiet();
  };
  for (auto waited = kLookAgain; !std::ranges::all_of(slots_, quiet); waited += kLookAgain) {
    if (waited > kGiveUp) {
      new std::shared_ptr<memory::SlotPool>(pool_);  // NOLINT: never deleted, as said above
      return;
    }
    std::this_thread::sleep_for(kLookAgain);
  }
}

void ExpertStore::resize(std::size_t slots, std::size_t cache_slots, const Poll& poll) {
  check_counts(slots, cache_slots);
  Lock lock(mutex_);
  std::vector<storage::ReadTicket> tickets;
  for (Slot& slot : slots_) {
    if (slot.state != State::kReading || !slot.speculative || slot.cancelled) continue;
    slot.cancelled = true;
    tickets.push_back(slot.ticket);
  }
  cancel(lock, tickets);
  wait_polling(lock, arrival_, poll, [&] { return unread_ == 0; });
  // What the system still has would be written to where the slot used to be.
  const auto failed = [](const Slot& slot) { return slot.state == State::kFailed; };
  for (reclaim(); std::ranges::any_of(slots_, failed); reclaim()) {
    throw_if_stalled("the number of expert slots cannot change");
    arrival_.wait_for(lock, kLookAgain);
    lock.unlock();
    ask(poll);
    lock.lock();
  }

  std::vector<std::pair<float, int>> staying;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const Slot& slot = slots_[i];
    if (slot.state == State::kReady) {
      staying.emplace_back(-policy_->value(slot.key), static_cast<int>(i));
    }
  }
  std::ranges::sort(staying);
  if (staying.size() > cache_slots) staying.resize(cache_slots);

  // Those that lie beyond the new end move to places that nobody keeps.
  std::vector<ExpertKey> keys(slots, kNoKey);
  std::vector<int> outside;
  for (const auto& [value, number] : staying) {
    if (static_cast<std::size_t>(number) >= slots) {
      outside.push_back(number);
    } else {
      keys[static_cast<std::size_t>(number)] = slots_[static_cast<std::size_t>(number)].key;
    }
  }
  std::size_t place = 0;
  for (const int number : outside) {
    while (keys[place] != kNoKey) ++place;
    std::memcpy(pool_->data(static_cast<int>(place)), pool_->data(number), pool_->slot_bytes());
    keys[place] = slots_[static_cast<std::size_t>(number)].key;
  }
  std::vector<bool> used(slots);
  for (std::size_t i = 0; i < slots; ++i) used[i] = keys[i] != kNoKey;
  pool_->resize(used);
  start_over(keys, cache_slots);
}

// The slots hold `keys` and nothing else.
void ExpertStore::start_over(const std::vector<ExpertKey>& keys, std::size_t cache_slots) {
  options_.slots = keys.size();
  options_.cache_slots = cache_slots;
  slots_.assign(keys.size(), Slot());
  queued_.assign(keys.size(), false);
  passing_.clear();
  passing_.reserve(keys.size());
  std::ranges::fill(slot_of_, -1);
  cached_ = 0;
  for (std::size_t i = keys.size(); i-- > 0;) {
    if (keys[i] == kNoKey) continue;
    slots_[i].state = State::kReady;
    slots_[i].key = keys[i];
    slots_[i].keep = true;
    slot_of_[keys[i]] = static_cast<int>(i);
    ++cached_;
  }
}

}  // namespace dsfp4::residency
