// Numbers that one thread counts and any thread may read meanwhile.
#pragma once

#include <atomic>

namespace dsfp4 {

/// Starts at 0. A reader may see it a little late, never torn. Only one thread at a time may add.
template <typename Number>
class Counter {
 public:
  Counter& operator+=(Number more) noexcept {
    value_.store(value_.load(std::memory_order_relaxed) + more, std::memory_order_relaxed);
    return *this;
  }
  Counter& operator++() noexcept { return *this += Number{1}; }
  operator Number() const noexcept {  // NOLINT(google-explicit-constructor): it is the number
    return value_.load(std::memory_order_relaxed);
  }

 private:
  std::atomic<Number> value_{};
};

}  // namespace dsfp4
