#include "memory/slot_pool.h"

#include <limits>
#include <utility>

#include "base/checked.h"
#include "dsfp4/error.h"

namespace dsfp4::memory {
namespace {

std::size_t pool_bytes(std::size_t count, std::size_t slot_bytes, const char* purpose) {
  const auto bytes = checked_mul(count, slot_bytes);
  if (!bytes || count > std::numeric_limits<int>::max())
    throw MemoryLimitError(purpose, std::numeric_limits<std::uint64_t>::max(), 0);
  return *bytes;
}

[[noreturn]] void refuse(const char* purpose, std::size_t bytes, const MemorySource& source) {
  throw MemoryLimitError(purpose, bytes, source.available(), "", source.name());
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
    : source_(source),
      purpose_(purpose),
      count_(count),
      slot_bytes_(in_blocks(slot_bytes)),
      bytes_(pool_bytes(count, slot_bytes_, purpose)) {
  free_.reserve(count);
  for (std::size_t i = count; i > 0; --i) free_.push_back(static_cast<int>(i - 1));
  memory_ = source.allocate(bytes_);
  if (memory_ == nullptr) refuse(purpose, bytes_, source);
}

SlotPool::~SlotPool() { source_.release(memory_, bytes_); }

int SlotPool::acquire() noexcept {
  if (free_.empty()) return -1;
  const int slot = free_.back();
  free_.pop_back();
  return slot;
}

void SlotPool::release(int slot) noexcept { free_.push_back(slot); }

void SlotPool::resize(const std::vector<bool>& used) {
  const std::size_t bytes = pool_bytes(used.size(), slot_bytes_, purpose_);
  std::vector<int> free;
  free.reserve(used.size());
  for (std::size_t i = used.size(); i > 0; --i) {
    if (!used[i - 1]) free.push_back(static_cast<int>(i - 1));
  }
  if (std::byte* memory = source_.resize(memory_, bytes_, bytes); memory != nullptr) {
    memory_ = memory;
    bytes_ = bytes;
  } else if (bytes > bytes_) {
    refuse(purpose_, bytes, source_);
  }
  count_ = used.size();
  free_ = std::move(free);
}

}  // namespace dsfp4::memory
