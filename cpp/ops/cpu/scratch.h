// Memory that ops work in: it grows to the largest size ever asked for and stays. CpuBackend's
// working_bytes() counts all of it ahead.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <new>
#include <vector>

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

/// A block for each thread that works on a range. They belong to the backend, not to the threads,
/// so that callers who come and go leave nothing behind.
class ThreadScratch {
 public:
  explicit ThreadScratch(int threads) : taken_(static_cast<std::size_t>(threads)) {}

  /// Blocks have at least `bytes` afterwards. Before a range; none may be taken.
  void reserve(std::size_t bytes) {
    bytes = padded(bytes);
    if (bytes <= block_bytes_) return;
    memory_.get(bytes * taken_.size());
    block_bytes_ = bytes;
  }
  static constexpr std::size_t padded(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

  /// One thread's block, until this ends.
  class Block {
   public:
    Block(ThreadScratch& all, std::size_t at) : all_(all), at_(at) {}
    ~Block() { all_.taken_[at_].value.store(false, std::memory_order_release); }
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;

    std::byte* data() const { return all_.memory_.get(0) + at_ * all_.block_bytes_; }

   private:
    ThreadScratch& all_;
    std::size_t at_;
  };
  /// At most as many at a time as there are threads. A thread gets its last one if that is free.
  Block take() {
    static std::atomic<std::size_t> threads{0};
    thread_local const std::size_t mine = threads.fetch_add(1, std::memory_order_relaxed);
    for (std::size_t at = mine % taken_.size();; at = (at + 1) % taken_.size()) {
      if (!taken_[at].value.exchange(true, std::memory_order_acquire)) return {*this, at};
    }
  }

 private:
  struct alignas(64) Taken {
    std::atomic<bool> value{false};
  };
  Scratch memory_;
  std::size_t block_bytes_ = 0;
  std::vector<Taken> taken_;
};

}  // namespace dsfp4::ops::cpu
