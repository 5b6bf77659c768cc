// The memory of the emulated device: addresses that the host cannot touch, bytes that lie
// elsewhere.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <shared_mutex>
#include <stdexcept>
#include <string>

#include "memory/pinned_memory.h"
#include "memory/source.h"

namespace dsfp4::ops::testing {

/// Live allocations by their addresses. Not for several threads.
class LiveMemory {
 public:
  void add(std::uintptr_t address, std::size_t bytes) { live_.emplace(address, bytes); }
  /// Returns the bytes of the allocation; 0 if there is none.
  std::size_t remove(std::uintptr_t address);
  /// True where the bytes all lie in one allocation.
  bool holds(std::uintptr_t address, std::size_t bytes) const;
  /// Where between `from` and `end` so many pages' bytes are free; 0 if nowhere.
  std::uintptr_t gap(std::uintptr_t from, std::uintptr_t end, std::size_t bytes) const;
  std::size_t count() const { return live_.size(); }

 private:
  std::map<std::uintptr_t, std::size_t> live_;
};

/// Gives addresses of a reservation without access, each as late again as possible. New memory is
/// 0xff, which is NaN. Any thread.
class EmulatedMemory final : public memory::MemorySource {
 public:
  explicit EmulatedMemory(std::size_t limit);
  ~EmulatedMemory() override;
  EmulatedMemory(const EmulatedMemory&) = delete;
  EmulatedMemory& operator=(const EmulatedMemory&) = delete;

  std::byte* allocate(std::size_t bytes) noexcept override;
  void release(std::byte* memory, std::size_t bytes) noexcept override;
  bool host_accessible() const noexcept override { return false; }
  const char* name() const noexcept override { return "VRAM"; }
  std::size_t available() const noexcept override;

  /// The n-th allocation from now on gives null, 1 is the next; 0 takes that back.
  void fail_allocation(std::int64_t n) { fail_in_.store(n); }
  std::size_t used() const;
  /// The most that used() has been.
  std::size_t peak() const;
  std::size_t allocations() const;

  /// While it lives nothing is allocated or released, so that what it found stays.
  class Access {
   public:
    explicit Access(const EmulatedMemory& memory) : memory_(memory), lock_(memory.mutex_) {}
    /// The bytes behind an address; throws std::logic_error if they are not all in one live
    /// allocation. Null where there are none.
    std::byte* bytes(const void* address, std::size_t count) const;

   private:
    const EmulatedMemory& memory_;
    std::shared_lock<std::shared_mutex> lock_;
  };

 private:
  const std::size_t limit_;
  const std::size_t span_;  // of addresses: more than the limit, as they are not used again soon
  std::byte* addresses_;
  std::byte* bytes_;
  std::atomic<std::int64_t> fail_in_ = 0;

  mutable std::shared_mutex mutex_;
  LiveMemory live_;
  std::size_t used_ = 0;
  std::size_t peak_ = 0;
  std::uintptr_t next_;
};

/// Host memory that knows what it gave and what of it is pinned. Any thread.
class EmulatedStaging final : public memory::MemorySource {
  // Ends the process where a block goes or moves that is pinned.
  struct Pages final : memory::MemorySource {
    explicit Pages(std::size_t bytes) : limit(bytes) {}
    std::byte* allocate(std::size_t bytes) noexcept override;
    void release(std::byte* memory, std::size_t bytes) noexcept override;
    /// Always elsewhere; counts as if it were in place.
    std::byte* resize(std::byte* memory, std::size_t before, std::size_t after) noexcept override;
    bool host_accessible() const noexcept override { return true; }
    const char* name() const noexcept override { return "RAM"; }
    std::size_t available() const noexcept override;

    mutable std::shared_mutex mutex;  // of what follows
    LiveMemory live;
    LiveMemory pinned;
    std::size_t limit;
    std::size_t used = 0;
  };
  struct Pins final : memory::Pinner {
    Pins(Pages& of, std::size_t bytes) : pages(of), limit(bytes) {}
    const char* pin(std::byte* memory, std::size_t bytes) noexcept override;
    bool unpin(std::byte* memory) noexcept override;

    Pages& pages;
    std::size_t limit;
    std::size_t used = 0;
  };

 public:
  /// Of `limit` bytes, of which `pinned_limit` can be pinned.
  EmulatedStaging(std::size_t limit, std::size_t pinned_limit)
      : pages_(limit), pins_(pages_, pinned_limit) {}

  std::byte* allocate(std::size_t bytes) noexcept override { return pinned_.allocate(bytes); }
  void release(std::byte* memory, std::size_t bytes) noexcept override {
    pinned_.release(memory, bytes);
  }
  std::byte* resize(std::byte* memory, std::size_t before, std::size_t after) noexcept override {
    return pinned_.resize(memory, before, after);
  }
  bool is_pinned(const std::byte* memory) noexcept override { return pinned_.is_pinned(memory); }
  bool host_accessible() const noexcept override { return true; }
  const char* name() const noexcept override { return pinned_.name(); }
  std::size_t available() const noexcept override { return pinned_.available(); }

  /// Refuses what would make it more than so many bytes.
  void set_limit(std::size_t bytes);
  void set_pinned_limit(std::size_t bytes);
  std::size_t used() const;

  /// While it lives nothing is allocated or released.
  class Access {
   public:
    explicit Access(const EmulatedStaging& staging)
        : pages_(staging.pages_), lock_(staging.pages_.mutex) {}
    /// Throws std::logic_error if the bytes are not all in one live allocation.
    void require(const void* staged, std::size_t count) const;
    /// True where the bytes are pinned.
    bool pinned(const void* staged, std::size_t count) const;

   private:
    const Pages& pages_;
    std::shared_lock<std::shared_mutex> lock_;
  };

 private:
  Pages pages_;
  Pins pins_;
  memory::PinnedMemory pinned_{pins_, pages_};
};

}  // namespace dsfp4::ops::testing
