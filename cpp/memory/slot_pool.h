// Slots of one size, for what comes from files and goes again: routed experts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "memory/source.h"

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
  /// `count` >= 1 slots of at least `slot_bytes` bytes, taken at once. Throws MemoryLimitError if
  /// the source does not have them for `purpose` ("the expert slots").
  SlotPool(std::size_t count, std::size_t slot_bytes, const char* purpose,
           MemorySource& source = host_memory());
  ~SlotPool();
  SlotPool(const SlotPool&) = delete;
  SlotPool& operator=(const SlotPool&) = delete;

  std::size_t count() const noexcept { return count_; }
  std::size_t slot_bytes() const noexcept { return slot_bytes_; }
  std::size_t free_count() const noexcept { return free_.size(); }
  std::uint64_t total_bytes() const noexcept { return bytes_; }

  /// The number of a free slot, or -1.
  int acquire() noexcept;
  /// Gives a slot back that is in use.
  void release(int slot) noexcept;
  /// The slot's memory, aligned to PhasedLayout::kBlock.
  std::byte* data(int slot) const noexcept {
    return memory_ + static_cast<std::size_t>(slot) * slot_bytes_;
  }

  /// Makes it used.size() >= 1 slots, perhaps at another place, which keep what they hold; those
  /// with `used` are in use from now on, the others free. Throws MemoryLimitError where there is no
  /// room for more slots, and then nothing has changed.
  void resize(const std::vector<bool>& used);

 private:
  MemorySource& source_;
  const char* purpose_;
  std::size_t count_;
  std::size_t slot_bytes_;
  std::size_t bytes_;  // that were taken
  std::byte* memory_;
  std::vector<int> free_;  // has room for all
};

}  // namespace dsfp4::memory
