#include "memory/source.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <sys/mman.h>

#include "memory/limits.h"

namespace dsfp4::memory {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

constexpr std::size_t in_pages(std::size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

class HostMemory final : public MemorySource {
 public:
  std::byte* allocate(std::size_t bytes) noexcept override {
    const bool huge = bytes >= kHugePage;
    const std::size_t spare = huge ? kHugePage : 0;
    if (bytes > SIZE_MAX - spare) return nullptr;
    void* mapped =
        ::mmap(nullptr, bytes + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    auto* memory = static_cast<std::byte*>(mapped);
    if (!huge) return memory;
    // What lies before the first huge page's border, and after the end, goes back.
    const auto address = reinterpret_cast<std::uintptr_t>(memory);
    const std::size_t before = (kHugePage - address % kHugePage) % kHugePage;
    if (before > 0) ::munmap(memory, before);
    std::byte* start = memory + before;
    const std::size_t length = in_pages(bytes);
    const std::size_t after = static_cast<std::size_t>(memory + bytes + spare - (start + length));
    if (after >= 4096) ::munmap(start + length, after);
    if (::madvise(start, length, MADV_HUGEPAGE) != 0) huge_refused_.store(true);
    return start;
  }
  void release(std::byte* memory, std::size_t bytes) noexcept override {
    ::munmap(memory, in_pages(bytes));
  }
  // Without a second copy, however large it is.
  std::byte* resize(std::byte* memory, std::size_t before, std::size_t after) noexcept override {
    if (after > SIZE_MAX - 4095) return nullptr;
    const std::size_t length = in_pages(after);
    void* moved = ::mremap(memory, in_pages(before), length, MREMAP_MAYMOVE);
    if (moved == MAP_FAILED) return nullptr;
    if (length >= kHugePage && ::madvise(moved, length, MADV_HUGEPAGE) != 0) {
      huge_refused_.store(true);
    }
    return static_cast<std::byte*>(moved);
  }
  bool host_accessible() const noexcept override { return true; }
  const char* name() const noexcept override { return "RAM"; }
  bool huge_refused() const noexcept { return huge_refused_.load(); }

 private:
  std::atomic<bool> huge_refused_ = false;
};

HostMemory& the_host_memory() noexcept {
  static HostMemory memory;
  return memory;
}

MemorySource* overriding = nullptr;

}  // namespace

MemorySource& host_memory() noexcept {
  return overriding != nullptr ? *overriding : the_host_memory();
}

HostMemoryOverride::HostMemoryOverride(MemorySource& source) noexcept : before_(overriding) {
  overriding = &source;
}

HostMemoryOverride::~HostMemoryOverride() { overriding = before_; }

const char* why_no_huge_pages() noexcept {
  constexpr const char* kOff =
      "transparent huge pages are off (/sys/kernel/mm/transparent_hugepage/enabled says never): "
      "reading weights from memory may be some percent slower";
  if (the_host_memory().huge_refused()) {
    return "the kernel refused huge pages: reading weights from memory may be some percent slower";
  }
  char text[64] = "";
  if (std::FILE* file = std::fopen("/sys/kernel/mm/transparent_hugepage/enabled", "re")) {
    if (std::fgets(text, sizeof(text), file) == nullptr) text[0] = '\0';
    std::fclose(file);
  } else {
    return kOff;
  }
  return std::strstr(text, "[never]") != nullptr ? kOff : "";
}

void require_host_accessible(const MemorySource& source) {
  if (source.host_accessible()) return;
  throw std::logic_error(std::string(source.name()) + " cannot be touched by the processor");
}

std::byte* MemorySource::resize(std::byte* memory, std::size_t before, std::size_t after) noexcept {
  if (!host_accessible()) return nullptr;
  std::byte* other = allocate(after);
  if (other == nullptr) return nullptr;
  std::memcpy(other, memory, std::min(before, after));
  release(memory, before);
  return other;
}

std::size_t MemorySource::available() const noexcept { return available_memory(); }

}  // namespace dsfp4::memory
