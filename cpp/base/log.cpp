#include "base/log.h"

#include <memory>
#include <mutex>
#include <utility>

namespace dsfp4 {
namespace {

struct Sink {
  std::mutex mutex;
  std::shared_ptr<const LogCallback> callback;
};

// Never destroyed: threads may outlive static objects.
Sink& sink() {
  static Sink& instance = *new Sink;
  return instance;
}

}  // namespace

void log(LogLevel level, std::string_view message) noexcept {
  try {
    std::shared_ptr<const LogCallback> callback;
    {
      const std::lock_guard lock(sink().mutex);
      callback = sink().callback;
    }
    if (callback) (*callback)(level, message);
  } catch (...) {  // NOLINT(bugprone-empty-catch): the callback's contract: it is dropped
  }
}

}  // namespace dsfp4

void dsfp4::set_log_callback(LogCallback callback) {
  std::shared_ptr<const LogCallback> next;
  if (callback) next = std::make_shared<const LogCallback>(std::move(callback));
  const std::lock_guard lock(sink().mutex);
  sink().callback.swap(next);  // the one before goes when the lock is gone
}
