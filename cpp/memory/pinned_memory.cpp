#include "memory/pinned_memory.h"

#include <cstdio>
#include <iterator>
#include <new>
#include <utility>

#include "base/log.h"

namespace dsfp4::memory {
namespace {

double megabytes(std::size_t bytes) { return static_cast<double>(bytes) * 1e-6; }

}  // namespace

std::byte* PinnedMemory::allocate(std::size_t bytes) noexcept {
  std::byte* memory = pages_.allocate(bytes);
  if (memory == nullptr) return nullptr;
  try {
    const std::lock_guard lock(mutex_);
    blocks_.emplace(memory, 0);
  } catch (const std::bad_alloc&) {
    pages_.release(memory, bytes);
    return nullptr;
  }
  pin(memory, bytes);
  return memory;
}

void PinnedMemory::release(std::byte* memory, std::size_t bytes) noexcept {
  if (!unpin(memory)) {
    char text[160];
    std::snprintf(text, sizeof(text),
                  "the GPU's driver failed to unpin %.1f MB of RAM, which stay taken until the "
                  "process ends",
                  megabytes(bytes));
    return log(LogLevel::kWarning, text);
  }
  {
    const std::lock_guard lock(mutex_);
    blocks_.erase(memory);
  }
  pages_.release(memory, bytes);
}

// Pages that are pinned must not move.
std::byte* PinnedMemory::resize(std::byte* memory, std::size_t before, std::size_t after) noexcept {
  if (!unpin(memory)) return nullptr;
  std::byte* moved = pages_.resize(memory, before, after);
  if (moved == nullptr) {
    pin(memory, before);
    return nullptr;
  }
  {
    const std::lock_guard lock(mutex_);
    auto block = blocks_.extract(memory);
    block.key() = moved;
    blocks_.insert(std::move(block));
  }
  pin(moved, after);
  return moved;
}

bool PinnedMemory::is_pinned(const std::byte* memory) noexcept {
  const std::lock_guard lock(mutex_);
  const auto next = blocks_.upper_bound(const_cast<std::byte*>(memory));  // only compared
  return next != blocks_.begin() && std::prev(next)->second > 0;
}

void PinnedMemory::pin(std::byte* memory, std::size_t bytes) noexcept {
  if (const char* why = pinner_.pin(memory, bytes); why != nullptr) return warn(bytes, why);
  const std::lock_guard lock(mutex_);
  blocks_.at(memory) = bytes;
}

bool PinnedMemory::unpin(std::byte* memory) noexcept {
  {
    const std::lock_guard lock(mutex_);
    if (blocks_.at(memory) == 0) return true;
  }
  if (!pinner_.unpin(memory)) return false;
  const std::lock_guard lock(mutex_);
  blocks_.at(memory) = 0;
  return true;
}

void PinnedMemory::warn(std::size_t bytes, const char* why) noexcept {
  if (warned_.exchange(true)) return;
  std::size_t pinned = 0;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& block : blocks_) pinned += block.second;
  }
  char text[400];
  std::snprintf(text, sizeof(text),
                "the system refused to pin %.1f MB of RAM beside the %.1f MB that are pinned (%s): "
                "copies between them and the GPU run slower; raise the limit for locked memory "
                "(ulimit -l, or the container's memlock)",
                megabytes(bytes), megabytes(pinned), why);
  log(LogLevel::kWarning, text);
}

}  // namespace dsfp4::memory
