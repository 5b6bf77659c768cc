// Callers of one model take turns, first come, first served.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>

#include "dsfp4/model.h"

namespace dsfp4::engine {

class Turns {
 public:
  /// A turn, for as long as it lives.
  class Turn {
   public:
    /// Waits, and asks `keep_going` meanwhile. Throws Error at once where this thread has the turn
    /// already: a callback of a call cannot call the same model.
    Turn(Turns& turns, const KeepGoing& keep_going);
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

    /// False: `keep_going` said no before the turn came.
    bool came() const noexcept { return came_; }

   private:
    Turns& turns_;
    bool came_ = false;
  };

 private:
  void leave(std::uint64_t ticket);

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::uint64_t> waiting_;  // tickets, the next first
  std::uint64_t tickets_ = 0;
  std::thread::id owner_;  // of the turn; none: it is free
};

}  // namespace dsfp4::engine
