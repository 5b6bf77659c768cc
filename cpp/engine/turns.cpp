#include "engine/turns.h"

#include <algorithm>

#include "dsfp4/error.h"

namespace dsfp4::engine {

Turns::Turn::Turn(Turns& turns, const Poll& poll) : turns_(turns) {
  const std::thread::id self = std::this_thread::get_id();
  std::unique_lock lock(turns_.mutex_);
  if (turns_.owner_ == self) {
    throw Error(
        "a callback called the model that is running it; only stats() may be called there, other "
        "calls once the first one has returned");
  }
  const std::uint64_t mine = ++turns_.tickets_;
  turns_.waiting_.push_back(mine);
  try {
    wait_polling(lock, turns_.changed_, poll, [&] {
      return turns_.waiting_.front() == mine && turns_.owner_ == std::thread::id();
    });
  } catch (...) {  // the poll left, without the lock
    lock.lock();
    std::erase(turns_.waiting_, mine);
    turns_.changed_.notify_all();
    throw;
  }
  turns_.waiting_.pop_front();
  turns_.owner_ = self;
}

Turns::Turn::~Turn() {
  const std::lock_guard lock(turns_.mutex_);
  turns_.owner_ = std::thread::id();
  turns_.changed_.notify_all();
}

}  // namespace dsfp4::engine
