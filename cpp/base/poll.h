// The way to leave a call that computes or waits: a function that is asked between bounded pieces
// of work, on the thread of the call. An exception that it throws leaves the call.
#pragma once

#include <chrono>
#include <functional>

namespace dsfp4 {

/// May be empty: then nobody wants to leave.
using Poll = std::function<void()>;

/// A wait asks at least so often.
inline constexpr std::chrono::milliseconds kPollPeriod{50};

inline void ask(const Poll& poll) {
  if (poll) poll();
}

/// Waits on `condition` until `ready()` holds, and asks `poll` meanwhile without the lock.
template <typename Lock, typename Condition, typename Ready>
void wait_polling(Lock& lock, Condition& condition, const Poll& poll, const Ready& ready) {
  if (!poll) {
    condition.wait(lock, ready);
    return;
  }
  while (!condition.wait_for(lock, kPollPeriod, ready)) {
    lock.unlock();
    poll();
    lock.lock();
  }
}

}  // namespace dsfp4
