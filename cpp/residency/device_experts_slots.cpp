// DeviceExperts' slots, and another number of them.
//
// They lie in blocks of some slots each, so that most of them stay where others are added or go.
#include <algorithm>
#include <limits>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "base/checked.h"
#include "dsfp4/error.h"
#include "residency/device_experts.h"

namespace dsfp4::residency {
namespace {

constexpr const char* kPurpose = "the expert slots";
/// Slots that are added at once are in so many blocks at most; a block takes whole pages of VRAM.
constexpr std::size_t kMostBlocks = 8;
constexpr std::size_t kLeastBlock = 16;  // slots, where there are as many

}  // namespace

void DeviceExperts::check_counts(std::size_t slots, std::size_t cache_slots) {
  if (cache_slots < slots) return;
  throw ParameterError("cache_slots", "is " + std::to_string(cache_slots) + " of " +
                                          std::to_string(slots) +
                                          " slots, but at least one must be left for experts that "
                                          "pass through");
}

// A product that does not fit into a number is more than there is.
std::size_t DeviceExperts::bytes_of(std::size_t slots) const {
  return checked_mul(slots, slot_bytes_).value_or(std::numeric_limits<std::size_t>::max());
}

// If it throws nothing has changed.
void DeviceExperts::add_slots(std::size_t count) {
  memory::MemorySource& source = device_.memory();
  if (bytes_of(count) > source.available()) {
    throw MemoryLimitError(kPurpose, bytes_of(count), source.available(), "", source.name());
  }
  const std::size_t each = std::max(kLeastBlock, (count + kMostBlocks - 1) / kMostBlocks);
  std::vector<Block> blocks;
  blocks.reserve(kMostBlocks);
  std::vector<Slot> made(count);
  for (std::size_t first = 0; first < count; first += each) {
    const std::size_t slots = std::min(each, count - first);
    const Block& block = blocks.emplace_back(
        std::make_unique<memory::Arena>(bytes_of(slots), kPurpose, source), slots);
    for (std::size_t i = first; i < first + slots; ++i) {
      made[i].read = device_.make_event();
      made[i].memory = block.memory->take(slot_bytes_);
    }
  }
  const std::size_t all = slots_.size() + count;
  free_.reserve(all);
  slots_.reserve(all);
  blocks_.reserve(blocks_.size() + blocks.size());
  std::ranges::move(blocks, std::back_inserter(blocks_));
  for (Slot& slot : made) {
    slots_.push_back(std::move(slot));
    make_free(static_cast<int>(slots_.size()) - 1);
  }
}

// Of each block, whether it stays where there are `slots` slots; of each slot, whether what it
// holds stays, which is cached then.
DeviceExperts::Staying DeviceExperts::staying(std::size_t slots, std::size_t cache_slots) {
  rank();
  Staying staying{{slots, cache_slots},
                  std::vector<bool>(blocks_.size(), true),
                  std::vector<bool>(slots_.size())};
  for (std::size_t i = 0; i < std::min(cache_slots, ranked_.size()); ++i) {
    staying.slots[static_cast<std::size_t>(slot_of_[ranked_[i].second])] = true;
  }
  std::vector<std::size_t> begins(blocks_.size());
  std::vector<std::pair<std::ptrdiff_t, std::size_t>> by_use;  // the block that is used least first
  by_use.reserve(blocks_.size());
  for (std::size_t b = 0, begin = 0; b < blocks_.size(); begin += blocks_[b++].slots) {
    begins[b] = begin;
    const auto first = staying.slots.begin() + static_cast<std::ptrdiff_t>(begin);
    by_use.emplace_back(
        std::count(first, first + static_cast<std::ptrdiff_t>(blocks_[b].slots), true), b);
  }
  std::ranges::sort(by_use);
  std::size_t left = slots_.size();
  for (std::size_t i = 0; left > slots; ++i) {
    const std::size_t b = by_use[i].second;
    staying.blocks[b] = false;
    std::fill_n(staying.slots.begin() + static_cast<std::ptrdiff_t>(begins[b]), blocks_[b].slots,
                false);
    left -= blocks_[b].slots;
  }
  return staying;
}

std::vector<ExpertKey> DeviceExperts::going(std::size_t slots, std::size_t cache_slots) {
  decided_ = staying(slots, cache_slots);
  std::vector<ExpertKey> keys;
  keys.reserve(ranked_.size());
  for (const auto& [worth, key] : ranked_) {
    if (!decided_->slots[static_cast<std::size_t>(slot_of_[key])]) keys.push_back(key);
  }
  return keys;
}

void DeviceExperts::resize(std::size_t slots, std::size_t cache_slots) {
  check_counts(slots, cache_slots);
  if (!leaving_.empty() ||
      std::ranges::any_of(slots_, [](const Slot& slot) { return slot.pins > 0; })) {
    throw std::logic_error("the expert slots change while experts are pinned or on their way back");
  }
  device_.synchronize();
  made_ = copies_;
  memory::MemorySource& source = device_.memory();
  const std::size_t room = source.available() + bytes_of(slots_.size());
  if (bytes_of(slots) > room) {
    throw MemoryLimitError(kPurpose, bytes_of(slots), room, "", source.name());
  }
  const bool is_decided = decided_ && decided_->counts == std::pair(slots, cache_slots);
  const Staying staying = is_decided ? *decided_ : this->staying(slots, cache_slots);
  decided_.reset();
  const std::size_t before = slots_.size();
  drop_others(staying);
  try {
    add_slots(slots - slots_.size());
  } catch (...) {
    take_back(before);
    throw;
  }
  cache_slots_ = cache_slots;
}

// As many slots as before, or fewer, of which one is left for experts that pass through.
void DeviceExperts::take_back(std::size_t slots) {
  try {
    add_slots(slots - slots_.size());
  } catch (...) {
    cache_slots_ = slots_.empty() ? 0 : std::min(cache_slots_, slots_.size() - 1);
    for (std::size_t number = slots_.size(); cached_ > cache_slots_;) {
      if (slots_[--number].cached) make_free(static_cast<int>(number));
    }
    throw;
  }
}

// The slots are numbered anew.
void DeviceExperts::drop_others(const Staying& staying) {
  std::vector<Block> blocks;
  std::vector<Slot> slots;
  blocks.reserve(blocks_.size());
  slots.reserve(slots_.size());
  std::ranges::fill(slot_of_, -1);
  cached_ = 0;
  std::size_t i = 0;
  for (std::size_t b = 0; b < blocks_.size(); ++b) {
    const std::size_t end = i + blocks_[b].slots;
    for (; i < end; ++i) {
      if (!staying.blocks[b]) continue;
      Slot& slot = slots.emplace_back(std::move(slots_[i]));
      slot.cached = slot.cached && staying.slots[i];
      if (slot.cached) {
        ++cached_;
        slot_of_[slot.key] = static_cast<int>(slots.size()) - 1;
      } else {
        slot.key = kNoKey;
      }
    }
    if (staying.blocks[b]) blocks.push_back(std::move(blocks_[b]));
  }
  blocks_ = std::move(blocks);
  slots_ = std::move(slots);
  is_ranked_ = false;
  free_.clear();
  for (std::size_t number = 0; number < slots_.size(); ++number) {
    if (slots_[number].key == kNoKey) make_free(static_cast<int>(number));
  }
}

bool DeviceExperts::is_consistent() const {
  std::size_t free = 0;
  std::size_t cached = 0;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const Slot& slot = slots_[i];
    const auto number = static_cast<int>(i);
    const auto leaves = [&](const Leaving& left) { return left.slot == number; };
    const bool is_free = slot.key == kNoKey && std::ranges::none_of(leaving_, leaves);
    if (is_free != (std::ranges::count(free_, number) == 1)) return false;
    if (slot.key == kNoKey ? slot.cached || slot.pins != 0 : slot_of_[slot.key] != number) {
      return false;
    }
    if (slot.key != kNoKey && !slot.cached && slot.pins <= 0) return false;
    free += is_free;
    cached += slot.cached;
  }
  const auto there = std::ranges::count_if(slot_of_, [](int number) { return number >= 0; });
  return free == free_.size() && cached == cached_ && cached <= cache_slots_ &&
         free + static_cast<std::size_t>(there) + leaving_.size() == slots_.size() &&
         made_ <= copies_;
}

}  // namespace dsfp4::residency
