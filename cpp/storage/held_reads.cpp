// Reads that are over and wait until a disk of ReaderOptions::bytes_per_second would have made
// them. They keep their jobs, so that no more is in flight than with such a disk.
#include <algorithm>
#include <optional>

#include "storage/request_queue.h"

namespace dsfp4::storage {

void RequestQueue::start_giving_back() {
  held_.reserve(jobs_.size());
  try {
    giver_ = start_thread([this] { give_back_held(); });
  } catch (...) {
    shut_down();  // nobody destroys what was not constructed
    throw;
  }
}

RequestQueue::Next RequestQueue::hold(Job& job) noexcept {
  const Lock lock(mutex_);
  if (job.request->stopping.load()) return Next::kOver;
  job.started.store(0);  // the system has done its part
  job.warned = false;
  held_.push_back(number(job));  // has room for all jobs
  ++stats_.held;
  if (*next_held() == held_.back()) give_.notify_one();
  return Next::kLater;
}

// A request that nobody waits for any more, else the first demand, else the first.
std::vector<std::size_t>::iterator RequestQueue::next_held() noexcept {
  auto next = std::ranges::find_if(
      held_, [this](std::size_t i) { return jobs_[i].request->stopping.load(); });
  if (next != held_.end()) return next;
  next = std::ranges::find_if(held_, [this](std::size_t i) { return !jobs_[i].speculative; });
  return next != held_.end() ? next : held_.begin();
}

// When the first of those that are held is due, if it has not been given back.
std::optional<System::Clock::time_point> RequestQueue::give_back_one(Lock& lock) noexcept {
  const auto next = next_held();
  Job& job = jobs_[*next];
  const bool over = job.request->stopping.load();
  const auto due = pace_.due(job.begun, job.piece.bytes);
  const auto now = system_.now();
  if (!over && due > now) return due;
  held_.erase(next);
  --stats_.held;
  if (over) {
    pace_.spend(job.begun, job.piece.bytes);
  } else {
    pace_.give(job.begun, job.piece.bytes, now);
    count_useful(job);
  }
  retire(lock, job);
  return std::nullopt;
}

void RequestQueue::give_back_held() noexcept {
  Lock lock(mutex_);
  while (!shut_down_.load()) {
    if (held_.empty()) {
      give_.wait(lock);
      continue;
    }
    if (const auto due = give_back_one(lock)) {
      // No longer than the clock of a test may stand still.
      const System::Clock::duration most = system_.watch_period();
      give_.wait_for(lock, std::min(most, *due - system_.now()));
      continue;
    }
    lock.unlock();
    if (wake_) wake_();  // the job is free
    lock.lock();
  }
}

}  // namespace dsfp4::storage
