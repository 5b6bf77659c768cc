// The watch over reads that do not come back.
#include <chrono>
#include <exception>
#include <string>

#include "storage/request_queue.h"

namespace dsfp4::storage {

void RequestQueue::watch() noexcept {
  Lock lock(mutex_);
  while (!shut_down_.load()) {
    if (stats_.in_flight == 0) {
      watch_.wait(lock);
    } else {
      watch_.wait_for(lock, system_.watch_period());
      look_for_stalls(lock);
    }
  }
}

void RequestQueue::look_for_stalls(Lock& lock) noexcept {
  const auto now = system_.now().time_since_epoch().count();
  const auto ticks = [](std::chrono::milliseconds span) {
    return std::chrono::duration_cast<System::Clock::duration>(span).count();
  };
  for (Job& job : jobs_) {
    const std::int64_t started = job.started.load();
    if (!job.request || started == 0 || job.given_up) continue;
    const std::int64_t age = now - started;
    if (age > ticks(options_.stall_limit)) {
      job.given_up = true;
      const std::shared_ptr<RequestState> request = job.request;
      if (!request->completing) {
        request->stopping.store(true);
        drop_pending(*request);
        try {
          const auto seconds =
              std::chrono::duration_cast<std::chrono::seconds>(options_.stall_limit);
          request->result = {ReadStatus::kFailed, files_.path(job.piece.file),
                             static_cast<std::int64_t>(job.piece.first_needed), ETIMEDOUT,
                             "the read has not come back for " + std::to_string(seconds.count()) +
                                 " s and was given up"};
        } catch (...) {
          request->result.error_number = ETIMEDOUT;
        }
        end(lock, request, ReadStatus::kFailed);
      }
      lock.unlock();
      if (wake_) wake_();  // the read may be cancelled
      lock.lock();
      finished_.notify_all();
    } else if (age > ticks(options_.stall_warning) && !job.warned) {
      job.warned = true;
      ++stats_.stalls;
      if (!options_.log) continue;
      const Piece piece = job.piece;
      lock.unlock();
      try {
        const auto seconds =
            std::chrono::duration_cast<std::chrono::seconds>(options_.stall_warning);
        options_.log(files_.path(piece.file) + ": a read of " + std::to_string(piece.bytes) +
                     " bytes at byte " + std::to_string(piece.offset) + " has not come back for " +
                     std::to_string(seconds.count()) + " s; waiting on");
      } catch (...) {  // NOLINT(bugprone-empty-catch): a read is worth more than a message
      }
      lock.lock();
    }
  }
}

}  // namespace dsfp4::storage
