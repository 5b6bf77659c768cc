// The ring of staging buffers for reads that cannot land in place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace dsfp4::storage {

class Staging {
 public:
  /// `count` buffers of `bytes` bytes (a multiple of kBlockBytes), aligned to kBlockBytes. Pages
  /// are taken when they are first used. Throws MemoryLimitError.
  Staging(std::size_t count, std::uint64_t bytes);
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  std::size_t count() const noexcept { return count_; }
  std::uint64_t buffer_bytes() const noexcept { return bytes_; }
  std::uint64_t total_bytes() const noexcept { return count_ * bytes_; }
  std::byte* buffer(int number) const noexcept {
    return memory_ + static_cast<std::uint64_t>(number) * bytes_;
  }

  /// A free buffer's number, or -1; the lowest free one, which is likeliest in the caches. Not safe
  /// to call from several threads at once, as give_back().
  int take() noexcept;
  void give_back(int number) noexcept;

 private:
  std::size_t count_;
  std::uint64_t bytes_;
  std::byte* memory_;
  std::vector<bool> taken_;
};

}  // namespace dsfp4::storage
