// Memory that an op works in: it grows to the largest size ever asked for and stays.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace dsfp4::ops::cpu {

class Scratch {
 public:
  /// At least `bytes`, on a 64-byte boundary; what it held is lost when it grows.
  std::byte* get(std::size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<std::byte*>(::operator new(bytes, kAlignment)));
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(std::byte* memory) const noexcept { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  std::size_t size_ = 0;
};

}  // namespace dsfp4::ops::cpu
