// Where an arena's block comes from: the host's memory, or what a backend implements.
#pragma once

#include <cstddef>

namespace dsfp4::memory {

class Allocator {
 public:
  static constexpr std::size_t kAlignment = 256;

  virtual ~Allocator() = default;
  /// `bytes` > 0 bytes, aligned to kAlignment and not initialised. Throws MemoryLimitError with
  /// `purpose` ("the weights") if they are not there or not within the limit.
  virtual std::byte* allocate(std::size_t bytes, const char* purpose) = 0;
  /// `memory` and `bytes` as allocate() had them.
  virtual void free(std::byte* memory, std::size_t bytes) noexcept = 0;
};

/// The process's own memory.
Allocator& host_allocator();

}  // namespace dsfp4::memory
