// One block of memory, taken at once and handed out from front to back.
#pragma once

#include <cstddef>
#include <memory>

namespace dsfp4::memory {

class Arena {
 public:
  static constexpr std::size_t kAlignment = 64;

  /// Bytes that `bytes` take up in an arena.
  static constexpr std::size_t padded(std::size_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }

  /// Throws MemoryLimitError if the system does not give `bytes` bytes for `purpose`
  /// ("the weights").
  Arena(std::size_t bytes, const char* purpose);

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
    void operator()(std::byte* memory) const noexcept;
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
