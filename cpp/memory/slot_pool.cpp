#include "memory/slot_pool.h"

#include <limits>

#include "base/checked.h"
#include "dsfp4/error.h"

namespace dsfp4::memory {
namespace {

std::size_t pool_bytes(std::size_t count, std::size_t slot_bytes, const char* purpose) {
  const auto bytes = checked_mul(count, slot_bytes);
  if (!bytes) throw MemoryLimitError(purpose, std::numeric_limits<std::uint64_t>::max(), 0);
  return *bytes;
}

std::size_t in_blocks(std::size_t bytes) {
  constexpr std::size_t kBlock = PhasedLayout::kBlock;
  return bytes > std::numeric_limits<std::size_t>::max() - kBlock
             ? bytes
             : (bytes + kBlock - 1) / kBlock * kBlock;
}

}  // namespace

std::size_t PhasedLayout::add(std::uint64_t file_offset, std::size_t bytes) {
  const std::size_t position = end_ + static_cast<std::size_t>(file_offset % kBlock);
  end_ = in_blocks(position + bytes);
  return position;
}

SlotPool::SlotPool(std::size_t count, std::size_t slot_bytes, const char* purpose,
                   MemorySource& source)
    : count_(count),
      slot_bytes_(in_blocks(slot_bytes)),
      arena_(pool_bytes(count, slot_bytes_, purpose), purpose, source),
      first_(arena_.take(arena_.size())) {
  free_.reserve(count);
  for (std::size_t i = count; i > 0; --i) free_.push_back(static_cast<std::int64_t>(i - 1));
}

std::int64_t SlotPool::acquire() noexcept {
  if (free_.empty()) return -1;
  const std::int64_t slot = free_.back();
  free_.pop_back();
  return slot;
}

void SlotPool::release(std::int64_t slot) noexcept { free_.push_back(slot); }

}  // namespace dsfp4::memory
