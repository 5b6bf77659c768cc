#include "engine/turns.h"

#include "base/poll.h"
#include "dsfp4/error.h"

namespace dsfp4::engine {

Turns::Turn::Turn(Turns& turns, const KeepGoing& keep_going) : turns_(turns) {
  const std::thread::id self = std::this_thread::get_id();
  std::unique_lock lock(turns_.mutex_);
  if (turns_.owner_ == self) {
    throw Error(
        "a callback called the model that is running it; only stats() may be called there, other "
        "calls once the first one has returned");
  }
  const std::uint64_t mine = ++turns_.tickets_;
  turns_.waiting_.push_back(mine);
  const auto is_next = [&] {
    return turns_.waiting_.front() == mine && turns_.owner_ == std::thread::id();
  };
  bool goes_on = true;
  try {
    while (goes_on && !turns_.changed_.wait_for(lock, kPollPeriod, is_next)) {
      lock.unlock();
      goes_on = !keep_going || keep_going();
      lock.lock();
    }
  } catch (...) {  // of keep_going, without the lock
    lock.lock();
    turns_.leave(mine);
    throw;
  }
  turns_.leave(mine);
  if (!goes_on) return;
  turns_.owner_ = self;
  came_ = true;
}

// Under the lock.
void Turns::leave(std::uint64_t ticket) {
  std::erase(waiting_, ticket);
  changed_.notify_all();
}

Turns::Turn::~Turn() {
  if (!came_) return;
  const std::lock_guard lock(turns_.mutex_);
  turns_.owner_ = std::thread::id();
  turns_.changed_.notify_all();
}

}  // namespace dsfp4::engine
