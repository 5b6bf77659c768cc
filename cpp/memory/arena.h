// One block of memory, taken at once and handed out from front to back.
#pragma once

#include <cstddef>
#include <memory>

#include "memory/allocator.h"

namespace dsfp4::memory {

class Arena {
 public:
  /// A cache line on the host, a matrix's boundary on a device.
  static constexpr std::size_t kAlignment = Allocator::kAlignment;

  /// Bytes that `bytes` take up in an arena.
  static constexpr std::size_t padded(std::size_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }

  /// Throws MemoryLimitError if `allocator` does not give `bytes` bytes for `purpose`
  /// ("the weights"). The allocator must outlive the arena.
  Arena(std::size_t bytes, const char* purpose, Allocator& allocator = host_allocator());

  /// The next `bytes` bytes, aligned to kAlignment and not initialised. Throws MemoryLimitError if
  /// they are not left.
  std::byte* take(std::size_t bytes);
  template <typename T>
  T* take_array(std::size_t count) {
    return reinterpret_cast<T*>(take(count * sizeof(T)));
  }

  std::size_t used() const noexcept { return used_; }
  std::size_t size() const noexcept { return size_; }
  /// Gives back everything that was taken since used() was `mark`.
  void release(std::size_t mark) noexcept { used_ = mark; }

 private:
  struct Free {
    Allocator* allocator;
    std::size_t bytes;
    void operator()(std::byte* memory) const noexcept { allocator->free(memory, bytes); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  std::size_t size_;
  std::size_t used_ = 0;
  const char* purpose_;
};

/// Bytes that the system can still give without swapping: the least of /proc/meminfo's MemAvailable
/// and what is left below the cgroup's limit. SIZE_MAX where neither can be read.
std::size_t available_memory();

}  // namespace dsfp4::memory
