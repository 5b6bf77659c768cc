#include "memory/arena.h"

#include <algorithm>

#include "dsfp4/error.h"
#include "memory/limits.h"

namespace dsfp4::memory {

Arena::Arena(std::size_t bytes, const char* purpose, MemorySource& source)
    : size_(padded(bytes)), purpose_(purpose) {
  if (size_ < bytes) throw MemoryLimitError(purpose, bytes, available_memory());
  const std::size_t taken = std::max(size_, kAlignment);
  std::byte* memory = source.allocate(taken);
  if (memory == nullptr) {
    throw MemoryLimitError(purpose, size_, source.available(), "", source.name());
  }
  memory_ = {memory, Free{&source, taken}};
}

DevicePtr<std::byte> Arena::take(std::size_t bytes) {
  const std::size_t wanted = padded(bytes);
  if (wanted < bytes || wanted > size_ - used_) {
    throw MemoryLimitError(purpose_, bytes, size_ - used_);
  }
  std::byte* taken = memory_.get() + used_;
  used_ += wanted;
  return taken;
}

}  // namespace dsfp4::memory
