#include "residency/device_experts.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <utility>

#include "base/checked.h"
#include "dsfp4/error.h"
#include "format/weight.h"

namespace dsfp4::residency {
namespace {

template <typename Expert>
auto matrices(Expert& expert) {
  return std::array{&expert.gate_proj, &expert.up_proj, &expert.down_proj};
}

// A matrix's place in a slot.
struct Place {
  std::size_t data = 0;
  std::size_t data_bytes = 0;
  std::size_t scales = 0;
  std::size_t scale_bytes = 0;  // 0: the format has none
};

template <typename Expert>
std::array<Place, 3> places_of(const Expert& shape) {
  std::array<Place, 3> places;
  std::size_t end = 0;
  const auto take = [&](std::size_t bytes) {
    return std::exchange(end, end + memory::Arena::padded(bytes));
  };
  for (std::size_t i = 0; i < places.size(); ++i) {
    const auto& matrix = *matrices(shape)[i];
    Place& place = places[i];
    place.data_bytes = format::data_bytes(matrix.format, matrix.rows, matrix.cols);
    place.scale_bytes = format::scale_bytes(matrix.format, matrix.rows, matrix.cols);
    place.data = take(place.data_bytes);
    place.scales = take(place.scale_bytes);
  }
  return places;
}

std::size_t end_of(const std::array<Place, 3>& places) {
  return places.back().scales + memory::Arena::padded(places.back().scale_bytes);
}

// Without what lies between them.
std::uint64_t bytes_in(const std::array<Place, 3>& places) {
  std::uint64_t bytes = 0;
  for (const Place& place : places) bytes += place.data_bytes + place.scale_bytes;
  return bytes;
}

}  // namespace

std::size_t DeviceExperts::slot_bytes(const ops::ExpertView& shape) {
  return end_of(places_of(shape));
}

DeviceExperts::DeviceExperts(ops::Device& device, std::size_t slot_bytes, std::size_t slots,
                             std::size_t cache_slots, std::uint64_t experts, Worth worth,
                             DeviceTrace* trace)
    : device_(device),
      slot_bytes_(slot_bytes),
      worth_(std::move(worth)),
      trace_(trace),
      slot_of_(experts, -1),
      copy_of_(experts, 0) {
  check_counts(slots, cache_slots);
  for (std::size_t i = 0; i < kCopyEvents; ++i) copy_events_.push_back(device_.make_event());
  for (std::size_t i = 0; i < kMostLeaving; ++i) leaving_events_.push_back(device_.make_event());
  add_slots(slots);
  cache_slots_ = cache_slots;
}

DeviceExperts::~DeviceExperts() { settle(); }

const ops::ExpertView* DeviceExperts::find(ExpertKey key) {
  const int number = slot_of_.at(key);
  if (number < 0) return nullptr;
  const std::uint64_t copies = copies_to_ask_for(key);
  if (copies > made_) device_.wait(ops::Queue::kCompute, copy_event(copies));
  ++slot(number).pins;
  ++(slot(number).cached ? stats_.hits : stats_.passing);
  return &slot(number).view;
}

bool DeviceExperts::is_cached(ExpertKey key) const {
  const int number = slot_of_.at(key);
  return number >= 0 && slots_[static_cast<std::size_t>(number)].cached;
}

const ops::ExpertView* DeviceExperts::bring(ExpertKey key, const ops::HostExpertView& from,
                                            bool keep) {
  return take_in(key, from, keep, true);
}

bool DeviceExperts::bring_for_later(ExpertKey key, const ops::HostExpertView& from, bool keep) {
  return take_in(key, from, keep, false) != nullptr;
}

// Ops that are queued from now on wait for the copies if it is needed `now`.
const ops::ExpertView* DeviceExperts::take_in(ExpertKey key, const ops::HostExpertView& from,
                                              bool keep, bool now) {
  decided_.reset();
  if (has(key)) {
    throw std::logic_error("expert " + std::to_string(key) + " is brought, but is there");
  }
  const std::size_t needed = end_of(places_of(from));
  if (needed > slot_bytes_) {
    throw std::logic_error("expert " + std::to_string(key) + " takes " + std::to_string(needed) +
                           " bytes, a slot has " + std::to_string(slot_bytes_));
  }
  if (slots_.empty()) {
    throw MemoryLimitError("the expert slots", slot_bytes_, device_.memory().available(), "",
                           device_.memory().name());
  }
  // A passing expert never takes a cached one's place.
  const bool cached = keep && make_cache_room(key);
  if (free_.empty()) return nullptr;
  std::ranges::pop_heap(free_, std::greater(), [this](int n) { return order_of(n); });
  const int number = free_.back();
  free_.pop_back();
  Slot& taken = slot(number);
  try {
    queue_copies(key, taken, from);
    if (now) device_.wait(ops::Queue::kCompute, copy_event(copies_));
  } catch (...) {
    settle();
    make_free(number);
    throw;
  }
  copy_of_[key] = copies_;
  slot_of_[key] = number;
  taken.key = key;
  taken.pins = 1;
  taken.cached = cached;
  if (cached) ++cached_;
  ++stats_.brought;
  stats_.brought_bytes += bytes_in(places_of(from));
  return &taken.view;
}

// True where the expert may be cached; gives up a cached one for it where that is worth less.
bool DeviceExperts::make_cache_room(ExpertKey key) {
  if (cached_ < cache_slots_) return true;
  const std::optional<ExpertKey> least = victim(key);
  if (!least) return false;
  ++stats_.evictions;
  make_free(slot_of_[*least]);
  return true;
}

std::optional<ExpertKey> DeviceExperts::victim(ExpertKey key) {
  if (cached_ < cache_slots_) return std::nullopt;
  if (!is_ranked_) rank();
  // One that is pinned now may be worth least of all again, so it keeps its place.
  for (std::size_t i = ranked_.size(); i-- > 0;) {
    const auto [least, other] = ranked_[i];
    if (!is_cached(other)) {
      ranked_.erase(ranked_.begin() + static_cast<std::ptrdiff_t>(i));
      continue;
    }
    if (slot(slot_of_[other]).pins > 0) continue;
    if (!(least < worth(key))) return std::nullopt;
    return other;
  }
  return std::nullopt;
}

float DeviceExperts::worth(ExpertKey key) const {
  float worth = 0.0f;
  worth_(std::span(&key, 1), std::span(&worth, 1));
  return worth;
}

void DeviceExperts::rank() {
  std::vector<ExpertKey> keys;
  keys.reserve(cached_);
  for (const Slot& slot : slots_) {
    if (slot.cached) keys.push_back(slot.key);
  }
  std::vector<float> worth(keys.size());
  worth_(keys, worth);
  ranked_.clear();
  ranked_.reserve(keys.size());
  for (std::size_t i = 0; i < keys.size(); ++i) ranked_.emplace_back(worth[i], keys[i]);
  std::ranges::sort(ranked_, std::greater());
  is_ranked_ = true;
}

// Until the last call here succeeds the slot is nobody's.
void DeviceExperts::queue_copies(ExpertKey key, Slot& slot, const ops::HostExpertView& from) {
  if (!slot.read_is_recorded) {
    device_.synchronize();
    slot.read_is_recorded = true;
  }
  device_.wait(ops::Queue::kUpload, slot.read);
  const auto places = places_of(from);
  if (trace_ != nullptr) trace_->begin_copy();
  for (std::size_t i = 0; i < places.size(); ++i) {
    const Place& place = places[i];
    const format::WeightView& matrix = *matrices(from)[i];
    const auto at = [&](std::size_t offset) {
      return slot.memory + static_cast<std::ptrdiff_t>(offset);
    };
    ops::WeightView& there = *matrices(slot.view)[i];
    there = {matrix.format,
             matrix.rows,
             matrix.cols,
             at(place.data),
             place.scale_bytes == 0 ? DevicePtr<std::byte>() : at(place.scales),
             matrix.global_scale};
    device_.copy_in(ops::Queue::kUpload, matrix.data, at(place.data), place.data_bytes);
    if (place.scale_bytes == 0) continue;
    device_.copy_in(ops::Queue::kUpload, matrix.scales, at(place.scales), place.scale_bytes);
  }
  if (trace_ != nullptr) trace_->end_copy(key, bytes_in(places));
  const ops::Event& made = copy_event(copies_ + 1);
  device_.record(ops::Queue::kUpload, made);
  ++copies_;
}

// ---- back to RAM

bool DeviceExperts::can_send_back(ExpertKey key) {
  return is_cached(key) && slot(slot_of_[key]).pins == 0 && leaving_.size() < kMostLeaving &&
         copied(key);
}

void DeviceExperts::send_back(ExpertKey key, const ExpertBytes& to) {
  if (!can_send_back(key)) {
    throw std::logic_error("expert " + std::to_string(key) + " cannot be sent back");
  }
  const int number = slot_of_[key];
  const std::size_t event = left_++ % kMostLeaving;
  Slot& left = slot(number);
  const auto places = places_of(left.view);
  leaving_.push_back({number, key, event});
  ++stats_.evictions;
  ++stats_.sent_back;
  slot_of_[key] = -1;
  left.key = kNoKey;
  left.cached = false;
  --cached_;
  try {
    for (std::size_t i = 0; i < places.size(); ++i) {
      const auto copy = [&](std::size_t offset, std::byte* there, std::size_t bytes) {
        if (bytes == 0) return;
        device_.copy_out(ops::Queue::kDownload, left.memory + static_cast<std::ptrdiff_t>(offset),
                         there, bytes);
      };
      copy(places[i].data, matrices(to)[i]->data, places[i].data_bytes);
      copy(places[i].scales, matrices(to)[i]->scales, places[i].scale_bytes);
    }
    device_.record(ops::Queue::kDownload, leaving_events_[event]);
  } catch (...) {
    settle();
    leaving_.pop_back();
    make_free(number);
    throw;
  }
}

std::optional<ExpertKey> DeviceExperts::sent_back() {
  if (leaving_.empty() || !device_.passed(leaving_events_[leaving_.front().event])) {
    return std::nullopt;
  }
  return drop_leaving();
}

void DeviceExperts::wait_sent_back() {
  if (!leaving_.empty()) device_.wait_for(leaving_events_[leaving_.front().event]);
}

std::optional<ExpertKey> DeviceExperts::drop_leaving() noexcept {
  if (leaving_.empty()) return std::nullopt;
  const Leaving left = leaving_.front();
  leaving_.pop_front();
  make_free(left.slot);
  return left.key;
}

// ---- the copies that were made

bool DeviceExperts::copied(ExpertKey key) {
  const std::uint64_t number = copies_to_ask_for(key);
  if (number <= made_) return true;
  try {
    if (!device_.passed(copy_event(number))) return false;
  } catch (...) {
    drop_uncopied();
    throw;
  }
  made_ = number;
  return true;
}

void DeviceExperts::wait_copied(ExpertKey key) {
  const std::uint64_t number = copies_to_ask_for(key);
  if (number <= made_) return;
  try {
    device_.wait_for(copy_event(number));
  } catch (...) {
    drop_uncopied();
    throw;
  }
  made_ = number;
}

// The first that have an event still and are made no sooner than those of `key`.
std::uint64_t DeviceExperts::copies_to_ask_for(ExpertKey key) const {
  const std::uint64_t number = copy_of_.at(key);
  return number + kCopyEvents > copies_ ? number : copies_ - kCopyEvents + 1;
}

void DeviceExperts::release(ExpertKey key) {
  const int number = slot_of_.at(key);
  if (number < 0 || slot(number).pins == 0) {
    throw std::logic_error("expert " + std::to_string(key) + " is released, but not pinned");
  }
  Slot& released = slot(number);
  if (--released.pins > 0) return;
  try {
    device_.record(ops::Queue::kCompute, released.read);
    released.read_is_recorded = true;
  } catch (...) {
    released.read_is_recorded = false;
  }
  released.release_number = ++releases_;
  if (!released.cached) make_free(number);
}

void DeviceExperts::drop_uncopied() noexcept {
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    if (!slot.cached || copy_of_[slot.key] <= made_) continue;
    if (slot.pins == 0) {
      make_free(static_cast<int>(i));
    } else {
      slot.cached = false;
      --cached_;
    }
  }
}

// The slot holds nothing from now on.
void DeviceExperts::make_free(int number) noexcept {
  Slot& freed = slot(number);
  if (freed.key != kNoKey) slot_of_[freed.key] = -1;
  freed.key = kNoKey;
  if (freed.cached) --cached_;
  freed.cached = false;
  free_.push_back(number);
  std::ranges::push_heap(free_, std::greater(), [this](int n) { return order_of(n); });
}

// Waits until the device is done, even if that is due to an error.
void DeviceExperts::settle() noexcept {
  try {
    device_.synchronize();
    made_ = copies_;
  } catch (...) {
    drop_uncopied();
  }
}

}  // namespace dsfp4::residency
