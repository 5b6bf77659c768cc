#include "base/thread_pool.h"

#include <algorithm>
#include <sched.h>
#include <string>
#include <system_error>
#include <utility>

#include "dsfp4/error.h"

namespace dsfp4 {
namespace {

thread_local bool inside_body = false;

constexpr int kSpins = 2000;  // 40 to 90 microseconds, as long as `pause` takes

template <typename Ready>
bool spin_until(const Ready& ready) {
  for (int i = 0; i < kSpins; ++i) {
    if (ready()) return true;
    __builtin_ia32_pause();
  }
  return false;
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  if (threads < 1) throw ParameterError("threads", "must be at least 1");
  workers_.reserve(static_cast<std::size_t>(threads - 1));
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { worker_loop(); });
  } catch (const std::system_error&) {
    const int started = size();
    stop();
    throw ParameterError("threads", "the system starts no more than " + std::to_string(started) +
                                        " of " + std::to_string(threads) +
                                        " threads; ask for fewer");
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::parallel_for(std::int64_t count, std::int64_t grain, const Body& body) {
  if (count <= 0) return;
  if (inside_body || workers_.empty() || count <= grain) {
    body(0, count);
    return;
  }
  const std::lock_guard turn(turn_);
  {
    const std::lock_guard lock(mutex_);
    body_ = &body;
    count_ = count;
    grain_ = std::max<std::int64_t>(grain, 1);
    next_.store(0, std::memory_order_relaxed);
    error_ = nullptr;
    running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  run_pieces();
  wait_for_workers();
  const std::lock_guard lock(mutex_);
  body_ = nullptr;
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void ThreadPool::run_pieces() {
  inside_body = true;
  for (;;) {
    const std::int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
    if (begin >= count_) break;
    try {
      (*body_)(begin, std::min(begin + grain_, count_));
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
      next_.store(count_, std::memory_order_relaxed);
    }
  }
  inside_body = false;
}

void ThreadPool::worker_loop() {
  std::uint64_t seen = 0;
  for (;;) {
    wait_for_work(seen);
    if (stopping_.load(std::memory_order_relaxed)) return;
    seen = generation_.load(std::memory_order_acquire);
    run_pieces();
    if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      const std::lock_guard lock(mutex_);  // so that the caller is not between look and sleep
      done_.notify_one();
    }
  }
}

void ThreadPool::wait_for_work(std::uint64_t seen) {
  const auto ready = [&] {
    return stopping_.load(std::memory_order_relaxed) ||
           generation_.load(std::memory_order_acquire) != seen;
  };
  if (spin_until(ready)) return;
  std::unique_lock lock(mutex_);
  wake_.wait(lock, ready);
}

void ThreadPool::wait_for_workers() {
  const auto ready = [&] { return running_.load(std::memory_order_acquire) == 0; };
  if (spin_until(ready)) return;
  std::unique_lock lock(mutex_);
  done_.wait(lock, ready);
}

int available_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace dsfp4
