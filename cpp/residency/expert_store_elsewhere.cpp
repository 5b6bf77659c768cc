// ExpertStore beside another memory that caches experts too.
#include <exception>
#include <string>

#include "dsfp4/error.h"
#include "residency/expert_store.h"

namespace dsfp4::residency {

bool ExpertStore::pin_if_ready(ExpertKey key) {
  const std::lock_guard lock(mutex_);
  const int number = slot_of_[key];
  if (number < 0) return false;
  Slot& slot = slots_[static_cast<std::size_t>(number)];
  const bool is_checked = slot.checked || !options_.check;
  if (slot.state != State::kReady || slot.cancelled || slot.speculative || !is_checked)
    return false;
  ++slot.pins;
  return true;
}

void ExpertStore::let_go(ExpertKey key) {
  const std::lock_guard lock(mutex_);
  forget(slots_[static_cast<std::size_t>(slot_of_[key])]);
  unpin_locked(key);
}

bool ExpertStore::take_back(ExpertKey key) {
  const std::lock_guard lock(mutex_);
  const int number = slot_of_[key];
  if (number < 0) return false;
  Slot& slot = slots_[static_cast<std::size_t>(number)];
  if (slot.state != State::kReady) return false;
  if (!slot.keep) ++cached_;
  slot.keep = true;
  return true;
}

std::optional<ExpertBytes> ExpertStore::make_room_for(ExpertKey key) {
  const std::lock_guard lock(mutex_);
  if (slot_of_[key] >= 0) return std::nullopt;
  const int number = find_slot(policy_->value(key));
  if (number < 0) return std::nullopt;
  Slot& slot = slots_[static_cast<std::size_t>(number)];
  slot = Slot();
  slot.state = State::kReading;
  slot.key = key;
  slot.pins = 1;
  slot.keep = true;
  ++cached_;
  slot_of_[key] = number;
  return images_[key].view_in(pool_->data(number));
}

void ExpertStore::came_back(ExpertKey key, bool whole) {
  const std::lock_guard lock(mutex_);
  const int number = slot_of_[key];
  Slot& slot = slots_[static_cast<std::size_t>(number)];
  if (whole) {
    slot.state = State::kReady;
    slot.checked = true;
    unpin_locked(key);
  } else if (slot.pins > 1) {  // somebody waits for it
    slot.state = State::kFailed;
    try {
      throw CudaError("expert " + std::to_string(key) + " did not come back from the GPU's memory");
    } catch (...) {  // if there is no memory for the words, that is the error
      slot.error = std::current_exception();
    }
    unpin_locked(key);
  } else {
    slot_of_[key] = -1;
    forget(slot);
    slot = Slot();
    pool_->release(number);
  }
  arrival_.notify_all();
}

}  // namespace dsfp4::residency
