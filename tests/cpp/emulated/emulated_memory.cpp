#include "emulated/emulated_memory.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <mutex>
#include <sys/mman.h>

namespace dsfp4::ops::testing {
namespace {

constexpr std::size_t kPage = 4096;
constexpr int kPoison = 0xff;

constexpr std::size_t in_pages(std::size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

std::uintptr_t number(const void* address) { return reinterpret_cast<std::uintptr_t>(address); }

std::byte* map(std::size_t bytes, int access) {
  void* mapped = ::mmap(nullptr, bytes, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::runtime_error("no address space for an emulated device");
  return static_cast<std::byte*>(mapped);
}

// release() cannot throw, and a test must not go on after this.
void end(const char* what) noexcept {
  std::fprintf(stderr, "emulated device: %s\n", what);
  std::abort();
}

std::logic_error not_live(const void* address, std::size_t count, const char* where) {
  char text[160];
  std::snprintf(text, sizeof(text), "%zu bytes at %p are not in live %s memory", count, address,
                where);
  return std::logic_error(text);
}

}  // namespace

// ---- what lives

std::size_t LiveMemory::remove(std::uintptr_t address) {
  const auto found = live_.find(address);
  if (found == live_.end()) return 0;
  const std::size_t bytes = found->second;
  live_.erase(found);
  return bytes;
}

bool LiveMemory::holds(std::uintptr_t address, std::size_t bytes) const {
  auto after = live_.upper_bound(address);
  if (after == live_.begin()) return false;
  const auto [first, size] = *std::prev(after);
  return address - first <= size && bytes <= size - (address - first);
}

std::uintptr_t LiveMemory::gap(std::uintptr_t from, std::uintptr_t end, std::size_t bytes) const {
  for (const auto& [first, size] : live_) {
    const std::uintptr_t after = first + in_pages(size);
    if (after <= from) continue;
    if (first >= from && first - from >= bytes) break;
    from = after;
  }
  return from <= end && bytes <= end - from ? from : 0;
}

// ---- the device's

EmulatedMemory::EmulatedMemory(std::size_t limit)
    : limit_(limit),
      span_(4 * in_pages(std::max<std::size_t>(limit, 1))),
      addresses_(map(span_, PROT_NONE)),
      bytes_(map(span_, PROT_READ | PROT_WRITE)),
      next_(number(addresses_)) {}

EmulatedMemory::~EmulatedMemory() {
  ::munmap(addresses_, span_);
  ::munmap(bytes_, span_);
}

std::byte* EmulatedMemory::allocate(std::size_t bytes) noexcept {
  if (fail_in_.load() > 0 && fail_in_.fetch_sub(1) == 1) return nullptr;
  const std::unique_lock lock(mutex_);
  if (bytes == 0 || bytes > limit_ - used_) return nullptr;
  const std::uintptr_t start = number(addresses_);
  std::uintptr_t found = live_.gap(next_, start + span_, in_pages(bytes));
  if (found == 0) found = live_.gap(start, start + span_, in_pages(bytes));
  if (found == 0) return nullptr;
  live_.add(found, bytes);
  used_ += bytes;
  peak_ = std::max(peak_, used_);
  next_ = found + in_pages(bytes);
  std::memset(bytes_ + (found - start), kPoison, bytes);
  return addresses_ + (found - start);
}

void EmulatedMemory::release(std::byte* memory, std::size_t bytes) noexcept {
  const std::unique_lock lock(mutex_);
  if (live_.remove(number(memory)) != bytes) end("memory is released that was not allocated so");
  used_ -= bytes;
  ::madvise(bytes_ + (memory - addresses_), in_pages(bytes), MADV_DONTNEED);
}

std::size_t EmulatedMemory::available() const noexcept {
  const std::shared_lock lock(mutex_);
  return limit_ - used_;
}

std::size_t EmulatedMemory::used() const {
  const std::shared_lock lock(mutex_);
  return used_;
}

std::size_t EmulatedMemory::peak() const {
  const std::shared_lock lock(mutex_);
  return peak_;
}

std::size_t EmulatedMemory::allocations() const {
  const std::shared_lock lock(mutex_);
  return live_.count();
}

std::byte* EmulatedMemory::Access::bytes(const void* address, std::size_t count) const {
  if (count == 0) return nullptr;
  if (!memory_.live_.holds(number(address), count)) throw not_live(address, count, "device");
  return memory_.bytes_ + (static_cast<const std::byte*>(address) - memory_.addresses_);
}

// ---- staging

std::byte* EmulatedStaging::Pages::allocate(std::size_t bytes) noexcept {
  const std::unique_lock lock(mutex);
  if (bytes == 0 || used > limit || bytes > limit - used) return nullptr;
  void* memory = std::aligned_alloc(kPage, in_pages(bytes));
  if (memory == nullptr) return nullptr;
  std::memset(memory, kPoison, bytes);
  live.add(number(memory), bytes);
  used += bytes;
  return static_cast<std::byte*>(memory);
}

void EmulatedStaging::Pages::release(std::byte* memory, std::size_t bytes) noexcept {
  const std::unique_lock lock(mutex);
  if (pinned.holds(number(memory), 1)) end("staging memory is released that is pinned");
  if (live.remove(number(memory)) != bytes)
    end("staging memory is released that was not allocated so");
  used -= bytes;
  std::free(memory);
}

std::byte* EmulatedStaging::Pages::resize(std::byte* memory, std::size_t before,
                                          std::size_t after) noexcept {
  const std::unique_lock lock(mutex);
  if (pinned.holds(number(memory), 1)) end("staging memory is resized that is pinned");
  if (!live.holds(number(memory), before)) end("memory is resized that is not staging memory");
  if (after == 0 || (after > before && (used > limit || after - before > limit - used))) {
    return nullptr;
  }
  void* moved = std::aligned_alloc(kPage, in_pages(after));
  if (moved == nullptr) return nullptr;
  std::memset(moved, kPoison, after);
  std::memcpy(moved, memory, std::min(before, after));
  live.remove(number(memory));
  std::free(memory);
  live.add(number(moved), after);
  used = used - before + after;
  return static_cast<std::byte*>(moved);
}

std::size_t EmulatedStaging::Pages::available() const noexcept {
  const std::shared_lock lock(mutex);
  return limit - std::min(limit, used);
}

const char* EmulatedStaging::Pins::pin(std::byte* memory, std::size_t bytes) noexcept {
  const std::unique_lock lock(pages.mutex);
  if (!pages.live.holds(number(memory), bytes)) end("memory is pinned that is not staging memory");
  if (pages.pinned.holds(number(memory), 1)) end("staging memory is pinned twice");
  if (used > limit || bytes > limit - used) return "no more, as ordered";
  pages.pinned.add(number(memory), bytes);
  used += bytes;
  return nullptr;
}

bool EmulatedStaging::Pins::unpin(std::byte* memory) noexcept {
  const std::unique_lock lock(pages.mutex);
  const std::size_t bytes = pages.pinned.remove(number(memory));
  if (bytes == 0) end("memory is unpinned that is not pinned");
  used -= bytes;
  return true;
}

void EmulatedStaging::set_limit(std::size_t bytes) {
  const std::unique_lock lock(pages_.mutex);
  pages_.limit = bytes;
}

void EmulatedStaging::set_pinned_limit(std::size_t bytes) {
  const std::unique_lock lock(pages_.mutex);
  pins_.limit = bytes;
}

std::size_t EmulatedStaging::used() const {
  const std::shared_lock lock(pages_.mutex);
  return pages_.used;
}

void EmulatedStaging::Access::require(const void* staged, std::size_t count) const {
  if (count > 0 && !pages_.live.holds(number(staged), count)) {
    throw not_live(staged, count, "staging");
  }
}

bool EmulatedStaging::Access::pinned(const void* staged, std::size_t count) const {
  return count == 0 || pages_.pinned.holds(number(staged), count);
}

}  // namespace dsfp4::ops::testing
