// The worker threads behind ThreadPool; see thread_pool.h for what they promise.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <sys/types.h>
#include <thread>
#include <vector>

#include "base/cores.h"
#include "base/thread_pool.h"

namespace dsfp4 {

class ThreadTeam {
 public:
  static constexpr int kMostWorkers = 1023;

  /// `cores`: what the process may run on; `mark`: of the processes that share them. Tests replace
  /// both.
  explicit ThreadTeam(Cores cores = find_cores(), std::string_view mark = kPinMark);
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  /// Has at least `workers` workers afterwards. Throws std::system_error.
  void grow(int workers);
  int workers() const noexcept { return worker_count_.load(std::memory_order_relaxed); }
  /// False in a child of fork(), which has none of the threads.
  bool has_its_threads() const noexcept;
  /// Workers are pinned; settled with the first of them.
  bool pins() const noexcept { return pins_; }
  /// The last range had no more threads than cores, so threads spun while they waited.
  bool spins() const noexcept { return spins_.load(std::memory_order_relaxed); }

  /// Runs the range on this thread and the first `workers` workers; see ThreadPool::parallel_for.
  void run(int workers, std::int64_t count, std::int64_t grain, const ThreadPool::Range& range);

  /// The calling thread is running a piece of a range.
  static bool inside_body() noexcept;

 private:
  /// First come, first served.
  class Turn {
   public:
    explicit Turn(ThreadTeam& team);
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    ThreadTeam& team_;
  };

  void settle_cores();
  void worker_loop(int index, std::uint64_t seen);
  void run_pieces();
  void pin(int index);
  template <typename Value, typename Ready>
  Value wait_until(const std::atomic<Value>& value, const Ready& ready) const;

  // Each on a cache line of its own, as different threads write them.
  // The order of the day: a count of ranges, and below it in kCountStep how many workers take part.
  // A worker that does not must read nothing else, as nobody waits for it.
  alignas(64) std::atomic<std::uint64_t> order_{0};
  alignas(64) std::atomic<std::int64_t> next_{0};      // first index that nobody has taken
  alignas(64) std::atomic<std::int32_t> running_{0};   // workers not yet done with this range
  alignas(64) std::atomic<std::uint64_t> ticket_{0};   // the next caller's turn
  alignas(64) std::atomic<std::uint64_t> serving_{0};  // whose turn it is

  // The range, written by the caller whose turn it is before order_, read by workers after it.
  alignas(64) ThreadPool::Range range_{};
  std::int64_t count_ = 0;
  std::int64_t grain_ = 1;
  std::mutex error_mutex_;
  std::exception_ptr error_;  // guarded by error_mutex_

  // Changed by the caller whose turn it is.
  std::unique_ptr<std::vector<std::thread>> threads_ = std::make_unique<std::vector<std::thread>>();
  std::atomic<int> worker_count_{0};  // threads_->size()
  std::atomic<bool> spins_{false};
  Cores cores_;
  std::string mark_name_;
  std::optional<PinMark> mark_;  // from the first worker on
  bool pins_ = false;
  pid_t process_;  // that has the threads
};

}  // namespace dsfp4
