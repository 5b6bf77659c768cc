// What both readers share: requests, the order in which their pieces go to the system, what becomes
// of a result, completions, and the watch over reads that stall. A reader takes jobs, makes their
// reads and gives the results back.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <limits>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "storage/file_set.h"
#include "storage/pace.h"
#include "storage/pieces.h"
#include "storage/reader.h"
#include "storage/staging.h"
#include "storage/system.h"

namespace dsfp4::storage {

/// One request, from submission until nobody asks about it any more.
struct RequestState {
  static constexpr std::uint64_t kNoReads = std::numeric_limits<std::uint64_t>::max();

  std::vector<Extent> extents;
  std::vector<std::uint32_t> files;  // those of the extents, each once
  std::vector<Fragment> fragments;

  std::atomic<ReadStatus> status = ReadStatus::kPending;
  std::atomic<bool> quiet = false;
  std::atomic<std::uint64_t> bytes_done = 0;
  std::atomic<bool> stopping = false;  // failed or cancelled: no new read

  // Guarded by the queue's mutex.
  std::function<void(const ReadResult&)> on_complete;
  std::shared_ptr<void> owner;
  Priority priority = Priority::kDemand;
  std::size_t pending = 0;    // pieces not yet taken
  std::size_t in_flight = 0;  // jobs
  bool completing = false;    // how it ends is decided
  bool cancelled = false;
  std::uint64_t reads_seen = kNoReads;      // the queue's, when it was found waiting
  System::Clock::time_point starved_since;  // and since when
  ReadResult result;
};

/// A piece that is with the system, or waits to be tried again.
struct Job {
  std::shared_ptr<RequestState> request;
  Piece piece;
  std::byte* buffer = nullptr;  // where the piece's first byte goes
  int staging = -1;             // number of its staging buffer, or -1
  std::size_t lane = 0;
  bool speculative = false;
  bool warned = false;                    // took longer than the limit of the warning
  bool given_up = false;                  // its request has completed without it
  System::Clock::time_point due;          // of the next attempt
  System::Clock::time_point begun;        // when the system was first asked
  std::atomic<std::int64_t> started = 0;  // in the clock's ticks; 0 if not with the system

  // Of the thread that has the job.
  bool direct = false;
  std::uint32_t done = 0;  // bytes that have arrived
  int attempts = 0;        // in a row without progress
  ReadCall call;           // the read that was made last
};

class RequestQueue {
 public:
  RequestQueue(const std::vector<std::filesystem::path>& paths, const ReaderOptions& options);
  ~RequestQueue();
  RequestQueue(const RequestQueue&) = delete;
  RequestQueue& operator=(const RequestQueue&) = delete;

  /// A thread for reading. Throws Error where the system starts no more.
  std::thread start_thread(std::function<void()> body);

  const ReaderOptions& options() const noexcept { return options_; }
  System& system() noexcept { return system_; }
  const FileSet& files() const noexcept { return files_; }
  Staging& staging() noexcept { return staging_; }
  /// Jobs in flight at most.
  std::size_t capacity() const noexcept { return jobs_.size(); }
  Job& job(std::size_t number) noexcept { return jobs_[number]; }
  std::size_t number(const Job& job) const noexcept {
    return static_cast<std::size_t>(&job - jobs_.data());
  }

  // ---- for callers of the reader ----
  std::shared_ptr<RequestState> submit(ReadRequest request);
  void promote(const std::shared_ptr<RequestState>& request) noexcept;
  void cancel(const std::shared_ptr<RequestState>& request) noexcept;
  ReadResult wait(RequestState& request);
  bool wait_for(RequestState& request, std::chrono::milliseconds most);
  ReaderStats stats() const;
  /// Cancels everything, waits until all is quiet or what is left has been given up and has an
  /// owner, and lets take() return null.
  void shut_down() noexcept;

  // ---- for the threads that read ----
  /// The next job, or null if none is due; `next_due` is when to ask again if nothing else happens.
  Job* try_take(std::optional<System::Clock::time_point>& next_due) noexcept;
  /// Waits for a job; null once the queue is shut down.
  Job* take() noexcept;
  /// Makes the job's call for what is left of it; a result that System::before_read gave for it.
  std::optional<int> prepare(Job& job) noexcept;
  /// Takes the result of the job's call, which `was_made` unless prepare() gave the result. True:
  /// the job goes on, call prepare() and read again. False: the job is no longer the caller's.
  bool settle(Job& job, int result, bool was_made) noexcept;
  /// Whether the job's request has been given up, so that the read may be cancelled.
  bool is_given_up(const Job& job) const noexcept;
  bool is_shut_down() const noexcept { return shut_down_.load(std::memory_order_acquire); }
  /// Whether a job is with the system still.
  bool has_jobs() const noexcept;

  /// Called whenever there may be something new to take, or a read to give up; not under the lock.
  void on_wake(std::function<void()> wake) { wake_ = std::move(wake); }

 private:
  // The pieces of one request on one device.
  struct Line {
    std::shared_ptr<RequestState> request;
    std::vector<Piece> pieces;
    std::size_t next = 0;
  };
  struct Lane {
    std::list<Line> lines[2];  // by priority
    std::size_t in_flight = 0;
    std::uint64_t speculative_bytes = 0;
    std::optional<std::uint32_t> stalled;  // the file whose reads were warned about
  };
  using Lock = std::unique_lock<std::mutex>;

  void check(const ReadRequest& request) const;
  Job* take_locked(Lock& lock, std::optional<System::Clock::time_point>& next_due) noexcept;
  bool only_speculation_in_flight() const noexcept;
  Job* take_retry(Lock& lock, System::Clock::time_point now, bool hold,
                  std::optional<System::Clock::time_point>& next_due) noexcept;
  Job* take_from_lanes(Priority priority) noexcept;
  Job* take_from(Lane& lane, Priority priority) noexcept;
  void start(Job& job, Lane& lane, Line& line, int staging) noexcept;
  void drop_pending(RequestState& request) noexcept;
  void end(Lock& lock, const std::shared_ptr<RequestState>& request, ReadStatus status) noexcept;
  void end_if_over(Lock& lock, const std::shared_ptr<RequestState>& request) noexcept;
  void become_quiet(Lock& lock, const std::shared_ptr<RequestState>& request) noexcept;
  // What comes after a result: read on at once, later (the job is among the retries), or nothing.
  enum class Next : std::uint8_t { kRead, kLater, kOver };
  Next advance(Job& job, int result) noexcept;
  Next retry(Job& job, int error) noexcept;
  Next wait_and_retry(Job& job) noexcept;
  Next came_short(Job& job) noexcept;
  void copy_out(const Job& job) noexcept;
  Next fail(Job& job, int error, const char* problem) noexcept;
  Next fail(Job& job, ReadResult&& result) noexcept;
  void count_useful(const Job& job) noexcept;
  void start_giving_back();
  Next hold(Job& job) noexcept;
  std::vector<std::size_t>::iterator next_held() noexcept;
  std::optional<System::Clock::time_point> give_back_one(Lock& lock) noexcept;
  void give_back_held() noexcept;
  void retire(Lock& lock, Job& job) noexcept;
  void wake() noexcept;
  void watch() noexcept;
  void start_ages_again(System::Clock::time_point now) noexcept;
  void give_up_stalled(Lock& lock) noexcept;
  bool is_left_behind(const Job& job, System::Clock::time_point now) const noexcept;
  void warn_of_stalls(Lock& lock) noexcept;
  void say_stalled(Lock& lock, const Job& oldest, std::size_t others) noexcept;
  void say_recovered(Lock& lock, std::uint32_t file) noexcept;
  void look_for_starvation(Lock& lock) noexcept;
  std::shared_ptr<RequestState> starved_request() noexcept;
  void give_up(Lock& lock, const std::shared_ptr<RequestState>& request, const Job& job,
               const char* consequence) noexcept;
  bool only_abandoned() const noexcept;

  ReaderOptions options_;
  System& system_;
  FileSet files_;
  Staging staging_;
  std::vector<Job> jobs_;
  std::function<void()> wake_;

  mutable std::mutex mutex_;
  std::condition_variable work_;      // something to take
  std::condition_variable finished_;  // a request has completed or become quiet
  std::condition_variable watch_;     // something is in flight, or the end
  std::condition_variable give_;      // another job is held back, or one need not be any more
  std::vector<Lane> lanes_;
  std::vector<std::size_t> free_jobs_;
  std::vector<std::size_t> retries_;  // jobs that wait for their time
  std::vector<std::size_t> held_;     // jobs that are over and held back
  Pace pace_;
  std::size_t next_lane_ = 0;
  std::size_t open_demands_ = 0;  // not yet completed
  ReaderStats stats_;
  System::Clock::time_point busy_start_;
  bool leaving_ = false;  // shut_down() waits
  System::Clock::time_point leaving_since_;
  std::atomic<bool> shut_down_ = false;
  std::thread watcher_;
  std::thread giver_;  // if there is a pace
};

}  // namespace dsfp4::storage
