// Host memory that a device copies from and to by itself: ordinary pages that the device pins once
// they are taken.
#pragma once

#include <atomic>
#include <cstddef>
#include <map>
#include <mutex>

#include "memory/source.h"

namespace dsfp4::memory {

/// A device's way to pin pages. Any thread.
class Pinner {
 public:
  virtual ~Pinner() = default;
  /// Null if the block's pages are pinned now; else why not, in a few words, and they are as they
  /// were.
  virtual const char* pin(std::byte* memory, std::size_t bytes) noexcept = 0;
  /// Of a block that pin() was given. False: it could not be done, and the pages must stay.
  virtual bool unpin(std::byte* memory) noexcept = 0;
};

/// A block that the device refuses to pin is ordinary memory: copies of it are slower and hold up
/// their caller. That is said once, as a warning. A block is pinned as a whole or not at all, so
/// that no copy spans both kinds.
class PinnedMemory final : public MemorySource {
 public:
  /// Blocks are of `pages`; both must outlive this.
  explicit PinnedMemory(Pinner& pinner, MemorySource& pages = host_memory())
      : pinner_(pinner), pages_(pages) {}

  std::byte* allocate(std::size_t bytes) noexcept override;
  void release(std::byte* memory, std::size_t bytes) noexcept override;
  /// No copy from or to the block may be under way. It is pinned again where it comes to lie; a
  /// refusal leaves it unpinned.
  std::byte* resize(std::byte* memory, std::size_t before, std::size_t after) noexcept override;
  bool is_pinned(const std::byte* memory) noexcept override;
  bool host_accessible() const noexcept override { return true; }
  const char* name() const noexcept override { return pages_.name(); }
  std::size_t available() const noexcept override { return pages_.available(); }

 private:
  void pin(std::byte* memory, std::size_t bytes) noexcept;
  bool unpin(std::byte* memory) noexcept;
  void warn(std::size_t bytes, const char* why) noexcept;

  Pinner& pinner_;
  MemorySource& pages_;
  std::atomic<bool> warned_ = false;
  std::mutex mutex_;
  std::map<std::byte*, std::size_t> blocks_;  // all, with the bytes of each that are pinned
};

}  // namespace dsfp4::memory
