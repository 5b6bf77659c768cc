// The watch over reads that do not come back.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <exception>
#include <optional>
#include <string>
#include <utility>

#include "storage/request_queue.h"

namespace dsfp4::storage {
namespace {

// The watcher that wakes up so much later than it asked was stopped itself, and reads with it.
constexpr std::chrono::seconds kStopped{10};
// Reads of a reader that ends may take so long; the watcher looks as often as kLeavingPeriod.
constexpr std::chrono::milliseconds kLeavingLimit{500};
constexpr std::chrono::milliseconds kLeavingPeriod{100};

std::string seconds_text(std::chrono::milliseconds span) {
  return std::to_string(std::chrono::duration_cast<std::chrono::seconds>(span).count()) + " s";
}

System::Clock::duration age(std::int64_t started, System::Clock::time_point now) {
  return now.time_since_epoch() - System::Clock::duration(started);
}

}  // namespace

void RequestQueue::watch() noexcept {
  Lock lock(mutex_);
  System::Clock::time_point looked;
  while (!shut_down_.load()) {
    const bool idle = stats_.in_flight == 0;
    if (idle) {
      watch_.wait(lock);
    } else {
      const std::chrono::milliseconds period = system_.watch_period();
      watch_.wait_for(lock, leaving_ ? std::min(period, kLeavingPeriod) : period);
    }
    const auto now = system_.now();
    if (idle || now - looked > kStopped) start_ages_again(now);
    looked = now;
    give_up_stalled(lock);
    warn_of_stalls(lock);
    look_for_starvation(lock);
  }
}

// A stopped process (Ctrl-Z, a frozen container) says nothing about the disk.
void RequestQueue::start_ages_again(System::Clock::time_point now) noexcept {
  for (Job& job : jobs_) {
    if (job.started.load() != 0) job.started.store(now.time_since_epoch().count());
  }
  for (Lane& lane : lanes_) {
    for (Line& line : lane.lines[static_cast<std::size_t>(Priority::kDemand)]) {
      line.request->reads_seen = RequestState::kNoReads;
    }
  }
}

void RequestQueue::give_up_stalled(Lock& lock) noexcept {
  const auto now = system_.now();
  for (Job& job : jobs_) {
    const std::int64_t started = job.started.load();
    if (!job.request || started == 0 || job.given_up) continue;
    const bool left_behind = is_left_behind(job, now);
    if (!left_behind && age(started, now) <= options_.stall_limit) continue;
    job.given_up = true;
    const std::shared_ptr<RequestState> request = job.request;
    if (!request->completing) {
      if (left_behind) {
        end(lock, request, ReadStatus::kCancelled);
      } else {
        give_up(lock, request, job, "and was given up");
      }
    }
    lock.unlock();
    if (wake_) wake_();  // the read may be cancelled
    lock.lock();
    finished_.notify_all();
  }
}

// The reader ends, and the read's owner lives on without it.
bool RequestQueue::is_left_behind(const Job& job, System::Clock::time_point now) const noexcept {
  return leaving_ && now - leaving_since_ > kLeavingLimit && job.request->owner != nullptr;
}

bool RequestQueue::only_abandoned() const noexcept {
  return std::ranges::all_of(jobs_, [](const Job& job) {
    return !job.request || (job.given_up && job.request->owner != nullptr);
  });
}

bool RequestQueue::has_jobs() const noexcept {
  const Lock lock(mutex_);
  return free_jobs_.size() < jobs_.size();
}

bool RequestQueue::is_given_up(const Job& job) const noexcept {
  const Lock lock(mutex_);
  return job.given_up;
}

// One warning for a device, however many of its reads have stalled, and one line when all are back.
void RequestQueue::warn_of_stalls(Lock& lock) noexcept {
  const auto now = system_.now();
  for (std::size_t i = 0; i < lanes_.size(); ++i) {
    const Job* oldest = nullptr;
    for (Job& job : jobs_) {
      const std::int64_t started = job.started.load();
      if (!job.request || started == 0 || job.lane != i) continue;
      if (!job.warned && age(started, now) > options_.stall_warning) {
        job.warned = true;
        ++stats_.stalls;
      }
      if (!job.warned) continue;
      if (oldest == nullptr || started < oldest->started.load()) oldest = &job;
    }
    Lane& lane = lanes_[i];
    if (oldest == nullptr) {
      if (const auto file = std::exchange(lane.stalled, std::nullopt)) say_recovered(lock, *file);
    } else if (!lane.stalled) {
      lane.stalled = oldest->piece.file;
      say_stalled(lock, *oldest, lane.in_flight - 1);
    }
  }
}

void RequestQueue::say_stalled(Lock& lock, const Job& oldest, std::size_t others) noexcept {
  if (!options_.log) return;
  const Piece piece = oldest.piece;
  lock.unlock();
  try {
    std::string line = files_.path(piece.file) + ": a read of " + std::to_string(piece.bytes) +
                       " bytes at byte " + std::to_string(piece.offset) +
                       " has not come back for " + seconds_text(options_.stall_warning);
    if (others > 0) line += ", and " + std::to_string(others) + " more of this disk are under way";
    options_.log(line + "; waiting on");
  } catch (...) {  // NOLINT(bugprone-empty-catch): a read is worth more than a message
  }
  lock.lock();
}

void RequestQueue::say_recovered(Lock& lock, std::uint32_t file) noexcept {
  if (!options_.log) return;
  lock.unlock();
  try {
    options_.log(files_.path(file) + ": the reads that had not come back are over");
  } catch (...) {  // NOLINT(bugprone-empty-catch): a read is worth more than a message
  }
  lock.lock();
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
    request->result = {
        ReadStatus::kFailed, files_.path(job.piece.file),
        static_cast<std::int64_t>(job.piece.first_needed), ETIMEDOUT,
        "the read has not come back for " + seconds_text(options_.stall_limit) + " " + consequence};
  } catch (...) {
    request->result.error_number = ETIMEDOUT;
  }
  end(lock, request, ReadStatus::kFailed);
}

}  // namespace dsfp4::storage
