#include "storage/staging.h"

#include <sys/mman.h>

#include "dsfp4/error.h"

namespace dsfp4::storage {

Staging::Staging(std::size_t count, std::uint64_t bytes)
    : count_(count), bytes_(bytes), memory_(nullptr), taken_(count) {
  void* memory =
      ::mmap(nullptr, total_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw MemoryLimitError("the staging buffers", total_bytes(), 0);
  memory_ = static_cast<std::byte*>(memory);
}

Staging::~Staging() { ::munmap(memory_, total_bytes()); }

int Staging::take() noexcept {
  for (std::size_t i = 0; i < count_; ++i) {
    if (taken_[i]) continue;
    taken_[i] = true;
    return static_cast<int>(i);
  }
  return -1;
}

void Staging::give_back(int number) noexcept { taken_[static_cast<std::size_t>(number)] = false; }

}  // namespace dsfp4::storage
