#include "memory/arena.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <new>
#include <string>

#include "dsfp4/error.h"

namespace dsfp4::memory {
namespace {

// The number after `key` in `file` (the first word if key is empty); SIZE_MAX if there is none
// ("max").
std::size_t number_in(const char* file, const std::string& key) {
  std::ifstream in(file);
  std::string word;
  while (in >> word) {
    if (!key.empty() && word != key) continue;
    if (!key.empty() && !(in >> word)) break;
    if (word[0] >= '0' && word[0] <= '9') return std::strtoull(word.c_str(), nullptr, 10);
    break;
  }
  return std::numeric_limits<std::size_t>::max();
}

class HostAllocator final : public Allocator {
 public:
  std::byte* allocate(std::size_t bytes, const char* purpose) override {
    void* memory = ::operator new(bytes, std::align_val_t{kAlignment}, std::nothrow);
    if (memory == nullptr) throw MemoryLimitError(purpose, bytes, available_memory());
    return static_cast<std::byte*>(memory);
  }
  void free(std::byte* memory, std::size_t) noexcept override {
    ::operator delete(memory, std::align_val_t{kAlignment});
  }
};

}  // namespace

Allocator& host_allocator() {
  static HostAllocator allocator;
  return allocator;
}

Arena::Arena(std::size_t bytes, const char* purpose, Allocator& allocator)
    : memory_(nullptr, Free{&allocator, std::max(padded(bytes), kAlignment)}),
      size_(padded(bytes)),
      purpose_(purpose) {
  memory_.reset(allocator.allocate(memory_.get_deleter().bytes, purpose));
}

std::byte* Arena::take(std::size_t bytes) {
  const std::size_t wanted = padded(bytes);
  if (wanted < bytes || wanted > size_ - used_) {
    throw MemoryLimitError(purpose_, bytes, size_ - used_);
  }
  std::byte* taken = memory_.get() + used_;
  used_ += wanted;
  return taken;
}

std::size_t available_memory() {
  constexpr std::size_t kUnknown = std::numeric_limits<std::size_t>::max();
  std::size_t available = number_in("/proc/meminfo", "MemAvailable:");
  if (available != kUnknown) available *= 1024;  // the file counts in KiB
  const std::size_t limit = number_in("/sys/fs/cgroup/memory.max", "");
  const std::size_t used = number_in("/sys/fs/cgroup/memory.current", "");
  if (limit != kUnknown && used != kUnknown) {
    available = std::min(available, limit > used ? limit - used : 0);
  }
  return available;
}

}  // namespace dsfp4::memory
