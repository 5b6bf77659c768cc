// The arithmetic of a disk that is held to a rate: when a read would be over if it were that slow.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

#include "storage/system.h"

namespace dsfp4::storage {

/// One read after the other at `bytes_per_second`. Of `bytes` bytes at most each, no more than
/// bytes_per_second * (span + kCatchUp) + bytes are over within any span, and time in which nothing
/// is asked for is not made up for.
class Pace {
 public:
  using Clock = System::Clock;
  /// Whoever gives reads back wakes up late; so much of that the next ones may make good.
  static constexpr std::chrono::milliseconds kCatchUp{1};

  explicit Pace(std::uint64_t bytes_per_second) : rate_(static_cast<double>(bytes_per_second)) {}

  bool limits() const noexcept { return rate_ > 0; }
  /// When the next read is over, of `bytes` bytes and begun at `started`.
  Clock::time_point due(Clock::time_point started, std::uint64_t bytes) const noexcept {
    const std::chrono::duration<double> takes(static_cast<double>(bytes) / rate_);
    return std::max(free_, started) + std::chrono::ceil<Clock::duration>(takes);
  }
  /// That read was given back at `now`, not before it was due.
  void give(Clock::time_point started, std::uint64_t bytes, Clock::time_point now) noexcept {
    free_ = std::max(due(started, bytes), now - kCatchUp);
  }
  /// The disk was busy with it, but nobody waits for it.
  void spend(Clock::time_point started, std::uint64_t bytes) noexcept {
    if (limits()) free_ = due(started, bytes);
  }

 private:
  double rate_;
  Clock::time_point free_ = Clock::time_point::min();
};

}  // namespace dsfp4::storage
