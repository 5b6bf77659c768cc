// ExpertStore's reads before anybody asks.
#include <algorithm>
#include <utility>
#include <vector>

#include "residency/expert_store.h"

namespace dsfp4::residency {

ExpertStore::Found ExpertStore::prefetch(ExpertKey key) {
  const std::lock_guard lock(mutex_);
  if (slot_of_[key] >= 0) return Found::kReady;
  const int number = free_or_passing();
  if (number < 0) return Found::kNoRoom;
  read_into(number, key, storage::Priority::kSpeculative);
  slots_[static_cast<std::size_t>(number)].speculative = true;
  stats_.speculative_bytes += image_bytes(key);
  return Found::kReading;
}

void ExpertStore::drop_speculation(std::int64_t layer) {
  Lock lock(mutex_);
  std::vector<storage::ReadTicket> tickets;
  const auto experts = static_cast<ExpertKey>(options_.experts);
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    if (!slot.speculative || slot.cancelled || slot.pins > 0 || slot.keep) continue;
    if (static_cast<std::int64_t>(slot.key / experts) != layer) continue;
    if (slot.state == State::kReading) {
      slot.cancelled = true;
      tickets.push_back(slot.ticket);
    } else if (cached_ < options_.cache_slots) {
      slot.keep = true;  // still unused, so the first to go
      ++cached_;
    } else {
      give_up_speculation(slot);  // it may still be found until the slot is taken
      pass_by(static_cast<int>(i));
    }
  }
  cancel(lock, tickets);
}

void ExpertStore::give_up_speculation(Slot& slot) noexcept {
  if (slot.speculative) stats_.wasted_bytes += image_bytes(slot.key);
  slot.speculative = false;
}

void ExpertStore::warm_up() {
  const std::lock_guard lock(mutex_);
  std::vector<std::pair<float, ExpertKey>> values;
  for (ExpertKey key = 0; key < images_.size(); ++key) {
    if (slot_of_[key] < 0) values.emplace_back(-policy_->value(key), key);
  }
  std::ranges::sort(values);
  for (const auto& [value, key] : values) {
    if (cached_ >= options_.cache_slots) return;
    const int number = pool_->acquire();
    if (number < 0) return;
    read_into(number, key, storage::Priority::kSpeculative);
    slots_[static_cast<std::size_t>(number)].keep = true;
    ++cached_;
    stats_.warm_bytes += image_bytes(key);
  }
}

std::vector<ExpertKey> ExpertStore::most_valued(std::int64_t layer) const {
  const std::lock_guard lock(mutex_);
  const auto experts = static_cast<ExpertKey>(options_.experts);
  std::vector<std::pair<float, ExpertKey>> values;
  values.reserve(experts);
  for (ExpertKey e = 0; e < experts; ++e) {
    const ExpertKey key = static_cast<ExpertKey>(layer) * experts + e;
    values.emplace_back(-policy_->value(key), key);
  }
  std::ranges::sort(values);
  std::vector<ExpertKey> keys(experts);
  std::ranges::transform(values, keys.begin(), [](const auto& pair) { return pair.second; });
  return keys;
}

}  // namespace dsfp4::residency
