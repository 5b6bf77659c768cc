// Callers of one model take turns, first come, first served.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>

#include "base/poll.h"

namespace dsfp4::engine {

class Turns {
 public:
  /// A turn, for as long as it lives.
  class Turn {
   public:
    /// Waits; what `poll` throws meanwhile leaves the queue. Throws Error at once where this thread
    /// has the turn already: a callback of a call cannot call the same model.
    Turn(Turns& turns, const Poll& poll);
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    Turns& turns_;
  };

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::uint64_t> waiting_;  // tickets, the next first
  std::uint64_t tickets_ = 0;
  std::thread::id owner_;  // of the turn; none: it is free
};

}  // namespace dsfp4::engine
