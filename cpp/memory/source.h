// Sources of big memory: ordinary RAM here, pinned RAM in pinned_memory.h; a device's memory
// is implemented by ops/ behind the same interface.
#pragma once

#include <cstddef>

#include "base/device_access.h"

namespace dsfp4::memory {

class MemorySource {
 public:
  virtual ~MemorySource() = default;
  /// `bytes` > 0 bytes, aligned to at least 4096, or null if there are not so many. Any thread.
  virtual std::byte* allocate(std::size_t bytes) noexcept = 0;
  /// Gives back what allocate(bytes) gave.
  virtual void release(std::byte* memory, std::size_t bytes) noexcept = 0;
  /// Makes a block that allocate(`before`) gave `after` > 0 bytes long, perhaps elsewhere; what it
  /// held stays as far as it fits. Null, and nothing has changed, if there are not so many bytes.
  virtual std::byte* resize(std::byte* memory, std::size_t before, std::size_t after) noexcept;
  /// Whether the processor can read and write it.
  virtual bool host_accessible() const noexcept = 0;
  /// "RAM", "VRAM".
  virtual const char* name() const noexcept = 0;
  /// Of memory that it gave, which a device copies: whether the copies are left under way, and do
  /// not hold up their caller.
  virtual bool is_pinned(const std::byte* memory) noexcept {
    static_cast<void>(memory);
    return true;
  }
  /// Bytes that it could still give.
  virtual std::size_t available() const noexcept;
};

/// Throws std::logic_error if the processor cannot touch what `source` gives.
void require_host_accessible(const MemorySource& source);

/// The processor's pointer to memory of `source`, which gave it and is host_accessible(); throws
/// std::logic_error for another one.
template <typename T>
T* on_host(const MemorySource& source, DevicePtr<T> pointer) {
  require_host_accessible(source);
  return DeviceAccess::address(pointer);
}

/// Pages of the process: aligned to 2 MiB and in huge pages where they are large enough and the
/// system allows it, and zero at first. They count as used when they are first written.
MemorySource& host_memory() noexcept;

/// A source that a test puts in place of host_memory() while it lives. Not for several threads.
class HostMemoryOverride {
 public:
  explicit HostMemoryOverride(MemorySource& source) noexcept;
  ~HostMemoryOverride();
  HostMemoryOverride(const HostMemoryOverride&) = delete;
  HostMemoryOverride& operator=(const HostMemoryOverride&) = delete;

 private:
  MemorySource* before_;
};

/// Empty if large allocations get huge pages; else one plain sentence that says why not and what it
/// costs.
const char* why_no_huge_pages() noexcept;

}  // namespace dsfp4::memory
