// One block of memory, taken at once and handed out from front to back.
#pragma once

#include <cstddef>
#include <memory>

#include "base/device_ptr.h"
#include "memory/source.h"

namespace dsfp4::memory {

class Arena {
 public:
  /// A matrix's boundary on a device.
  static constexpr std::size_t kAlignment = 256;

  /// Bytes that `bytes` take up in an arena.
  static constexpr std::size_t padded(std::size_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }

  /// Takes `bytes` bytes from `source`, which must outlive the arena. Throws MemoryLimitError if it
  /// does not have them for `purpose` ("the weights").
  Arena(std::size_t bytes, const char* purpose, MemorySource& source = host_memory());

  /// The next `bytes` bytes, aligned to kAlignment, with arbitrary values. Throws MemoryLimitError
  /// if they are not left.
  DevicePtr<std::byte> take(std::size_t bytes);
  template <typename T>
  DevicePtr<T> take_array(std::size_t count) {
    return take(count * sizeof(T)).template as<T>();
  }

  std::size_t used() const noexcept { return used_; }
  std::size_t size() const noexcept { return size_; }
  /// Gives back everything that was taken since used() was `mark`.
  void release(std::size_t mark) noexcept { used_ = mark; }

 private:
  struct Free {
    MemorySource* source;
    std::size_t bytes;
    void operator()(std::byte* memory) const noexcept { source->release(memory, bytes); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  std::size_t size_;
  std::size_t used_ = 0;
  const char* purpose_;
};

}  // namespace dsfp4::memory
