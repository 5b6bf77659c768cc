// The watch over reads that do not come back.
#include <algorithm>
#include <cerrno>
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
      look_for_starvation(lock);
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
      if (!request->completing) give_up(lock, request, job, "and was given up");
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

// Where a read was given up and for as long again none ends and a demand does not begin, such reads
// hold all that one takes: a job, a thread or a staging buffer.
void RequestQueue::look_for_starvation(Lock& lock) noexcept {
  const auto stuck =
      std::ranges::find_if(jobs_, [](const Job& job) { return job.request && job.given_up; });
  if (stuck == jobs_.end()) return;
  // Giving up lets go of the lock, so each time anew.
  while (const std::shared_ptr<RequestState> request = starved_request()) {
    give_up(lock, request, *stuck, "and with others keeps every new one from being made");
  }
}

// A demand that has seen no read end for the limit.
std::shared_ptr<RequestState> RequestQueue::starved_request() noexcept {
  const auto now = system_.now();
  for (Lane& lane : lanes_) {
    for (const Line& line : lane.lines[static_cast<std::size_t>(Priority::kDemand)]) {
      RequestState& request = *line.request;
      if (request.reads_seen != stats_.reads) {
        request.reads_seen = stats_.reads;
        request.starved_since = now;
      } else if (now - request.starved_since > options_.stall_limit) {
        return line.request;
      }
    }
  }
  return nullptr;
}

// Fails what has not completed, because of a read that has not come back.
void RequestQueue::give_up(Lock& lock, const std::shared_ptr<RequestState>& request, const Job& job,
                           const char* consequence) noexcept {
  request->stopping.store(true);
  drop_pending(*request);
  try {
    const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(options_.stall_limit);
    request->result = {
        ReadStatus::kFailed, files_.path(job.piece.file),
        static_cast<std::int64_t>(job.piece.first_needed), ETIMEDOUT,
        "the read has not come back for " + std::to_string(seconds.count()) + " s " + consequence};
  } catch (...) {
    request->result.error_number = ETIMEDOUT;
  }
  end(lock, request, ReadStatus::kFailed);
}

}  // namespace dsfp4::storage
