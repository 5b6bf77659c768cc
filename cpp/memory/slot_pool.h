// Slots of one size, for what comes from files and goes again: routed experts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "memory/arena.h"

namespace dsfp4::memory {

/// Lays extents of a file out in a slot such that a direct read lands in place: each keeps its
/// file offset's phase modulo kBlock, and the blocks around it belong to it alone, as
/// storage::Extent::slack asks.
class PhasedLayout {
 public:
  static constexpr std::size_t kBlock = 4096;

  /// Where an extent of `bytes` bytes at `file_offset` goes, from the slot's start.
  std::size_t add(std::uint64_t file_offset, std::size_t bytes);
  /// Bytes of all that was added; a multiple of kBlock.
  std::size_t bytes() const noexcept { return end_; }
  /// The most that an extent of `bytes` bytes takes, whatever its phase.
  static constexpr std::size_t most(std::size_t bytes) {
    return (bytes + kBlock - 1 + kBlock - 1) / kBlock * kBlock;
  }

 private:
  std::size_t end_ = 0;
};

/// Not safe to use from several threads at once.
class SlotPool {
 public:
  /// `count` slots of at least `slot_bytes` bytes, taken at once. Throws MemoryLimitError if the
  /// source does not have them.
  SlotPool(std::size_t count, std::size_t slot_bytes, const char* purpose,
           MemorySource& source = host_memory());

  std::size_t count() const noexcept { return count_; }
  std::size_t slot_bytes() const noexcept { return slot_bytes_; }
  std::size_t free_count() const noexcept { return free_.size(); }
  std::uint64_t total_bytes() const noexcept { return arena_.size(); }

  /// The number of a free slot, or -1.
  std::int64_t acquire() noexcept;
  /// Gives a slot back that is in use.
  void release(std::int64_t slot) noexcept;
  /// The slot's memory, aligned to PhasedLayout::kBlock.
  std::byte* data(std::int64_t slot) const noexcept {
    return first_ + static_cast<std::size_t>(slot) * slot_bytes_;
  }

 private:
  std::size_t count_;
  std::size_t slot_bytes_;
  Arena arena_;
  std::byte* first_;
  std::vector<std::int64_t> free_;  // has room for all
};

}  // namespace dsfp4::memory
