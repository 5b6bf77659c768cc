// The process's compute threads: a fixed team that splits index ranges. Between ranges a thread
// spins for some ten microseconds before it sleeps: the ops of a decode step follow each other that
// fast.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace dsfp4 {

class ThreadPool {
 public:
  /// Handles indices [begin, end).
  using Body = std::function<void(std::int64_t begin, std::int64_t end)>;

  /// A team of `threads` >= 1, the caller of parallel_for counted in. Throws ParameterError where
  /// the system does not start so many.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const noexcept { return static_cast<int>(workers_.size()) + 1; }

  /// Runs `body` over [0, count) in pieces of at most `grain` >= 1 indices, and returns when all
  /// are done. Which thread takes which piece is left open, so a piece must not depend on another.
  /// The first exception of a body is rethrown here, after the others have stopped. Calls from
  /// several threads take turns; a call from inside a body runs on the thread that makes it.
  void parallel_for(std::int64_t count, std::int64_t grain, const Body& body);

 private:
  void stop();
  void worker_loop();
  void wait_for_work(std::uint64_t seen);
  void wait_for_workers();
  void run_pieces();

  std::vector<std::thread> workers_;
  std::mutex turn_;  // held by the caller whose range is being worked on

  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::atomic<std::uint64_t> generation_{0};  // changed under mutex_
  std::atomic<int> running_{0};               // workers not yet done with this generation
  std::atomic<bool> stopping_{false};         // changed under mutex_
  std::exception_ptr error_;                  // guarded by mutex_

  const Body* body_ = nullptr;
  std::int64_t count_ = 0;
  std::int64_t grain_ = 1;
  std::atomic<std::int64_t> next_{0};
};

/// The cores that this process may run on (its affinity mask), at least 1.
int available_cores();

}  // namespace dsfp4
