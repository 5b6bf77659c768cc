// A device for tests without a GPU that treats its caller as a GPU does: its memory is out of the
// host's reach, work runs in queues of their own while the caller goes on, and errors of that work
// surface where the caller waits. It can be told to be slow, to stop, and to fail.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>

#include "emulated/emulated_memory.h"
#include "ops/device.h"

namespace dsfp4::ops::testing {

inline constexpr std::size_t kQueues = 3;

struct EmulatedOptions {
  std::size_t memory_limit = std::size_t{64} << 20;
  std::size_t staging_limit = std::size_t{64} << 20;
  std::size_t pinned_limit = std::numeric_limits<std::size_t>::max();  // bytes of it; 0: none
  double copy_bytes_per_second = 0.0;  // of copies in kUpload and kDownload; 0: no limit
  bool routed_experts = false;         // Ops::has_routed_experts()
};

/// Counts of the work done so far. Work in queues counts as it ends; what failed or was left out
/// does not.
struct EmulatedCounts {
  std::int64_t ops = 0;
  std::array<std::int64_t, kQueues> copies{};  // by Queue; upload() and download() are kCompute's
  std::array<std::int64_t, kQueues> copied_bytes{};
  std::int64_t bodies = 0;        // of segments
  std::int64_t replayed = 0;      // segments without their body
  std::int64_t host_waits = 0;    // download(), wait_for(), synchronize(), Ops::sample()
  std::int64_t timed_events = 0;  // that are there now
  std::int64_t unpinned = 0;      // copies of memory that is not pinned

  std::int64_t copies_in(Queue queue) const { return copies[static_cast<std::size_t>(queue)]; }
  std::int64_t bytes_in(Queue queue) const { return copied_bytes[static_cast<std::size_t>(queue)]; }
};

/// Once work has failed, no other runs, and every call that waits or asks throws the error: a
/// CudaError for failures that were ordered, else std::logic_error.
class EmulatedDevice final : public Device {
 public:
  explicit EmulatedDevice(const EmulatedOptions& options = {});
  /// Lets the queues run empty.
  ~EmulatedDevice() override;

  EmulatedMemory& memory() override { return memory_; }
  EmulatedStaging& staging() override { return staging_; }
  void upload(const void* from, DevicePtr<void> to, std::size_t bytes) override;
  void download(DevicePtr<const void> from, void* to, std::size_t bytes) override;
  void copy_in(Queue queue, const void* staged, DevicePtr<void> to, std::size_t bytes) override;
  void copy_out(Queue queue, DevicePtr<const void> from, void* staged, std::size_t bytes) override;
  Event make_event() override;
  void record(Queue queue, const Event& event) override;
  void wait(Queue queue, const Event& event) override;
  bool passed(const Event& event) override;
  Event make_timed_event() override;
  Clock::time_point time_of(const Event& event) override;
  void wait_for(const Event& event) override;
  void synchronize() override;

  // ---- for tests

  /// Nothing of the queue that has not begun yet begins before let_go().
  void hold(Queue queue);
  void let_go(Queue queue);
  /// How much later copies that are queued from now on begin: all, or only the n-th (1 is the
  /// next).
  void delay_copies(Queue queue, std::chrono::milliseconds delay);
  void delay_copy(Queue queue, std::int64_t n, std::chrono::milliseconds delay);
  /// The n-th that is queued from now on fails; 1 is the next.
  void fail_copy(Queue queue, std::int64_t n);
  void fail_op(std::int64_t n);
  /// Waits until the queues are empty, and forgets the error.
  void clear_error();
  EmulatedCounts counts() const;

  // ---- for EmulatedOps

  using Work = std::function<void(const EmulatedMemory::Access&)>;
  void push_op(const char* name, Work work);
  /// Numbered, delayed and counted as the queue's other copies.
  void push_copy(Queue queue, const char* name, std::size_t bytes, Work copy);
  /// A copy from or to staging(). It has been made when this returns, if that is not pinned.
  void push_staged(Queue queue, const char* name, const void* staged, std::size_t bytes, Work copy);
  /// Waits for the compute queue, as a call that brings a result to the host does.
  void wait_for_ops(const char* what);
  /// Lets go of all queues and waits until they are empty. Throws no error of theirs.
  void run_empty() noexcept;
  /// Between the two the thread that began may not use the queues, nor others the compute queue.
  void begin_recording();
  void end_recording() noexcept;
  /// Throws CudaError if this thread records.
  void refuse_in_recording(const char* what, std::optional<Queue> queue = {}) const;
  void count_body() { bodies_.fetch_add(1); }
  void count_replay() { replayed_.fetch_add(1); }

 private:
  class Marker {
   public:
    void pass();
    bool passed();
    void wait();
    Clock::time_point passed_at();  // throws std::logic_error if it has not

   private:
    std::mutex mutex_;
    std::condition_variable changed_;
    bool passed_ = false;
    Clock::time_point passed_at_;
  };
  struct Item {
    std::function<void()> run;
    bool always = false;  // after an error, too
  };
  struct Line {
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<Item> items;
    bool held = false;
    bool ends = false;
    // Orders of the test: the counts run down as work is queued.
    std::int64_t op_fails_in = 0;
    std::int64_t copy_fails_in = 0;
    std::int64_t copy_is_late_in = 0;
    std::chrono::milliseconds late{0};
    std::chrono::milliseconds all_late{0};
    std::atomic<std::int64_t> copies = 0;
    std::atomic<std::int64_t> copied_bytes = 0;
    std::thread worker;
  };

  Line& line(Queue queue) { return lines_[static_cast<std::size_t>(queue)]; }
  void work(Line& line);
  void push(Line& line, Item item);
  std::shared_ptr<Marker> mark(Queue queue);
  std::shared_ptr<Marker> marker_of(const Event& event);
  void fail(bool ordered, const std::string& problem);
  void throw_error() const;
  void free_event(void* handle) noexcept override;

  EmulatedMemory memory_;
  EmulatedStaging staging_;
  const double copy_bytes_per_second_;
  std::array<Line, kQueues> lines_;

  mutable std::mutex events_mutex_;
  std::map<void*, std::shared_ptr<Marker>> events_;  // by handle; null: never recorded
  std::set<void*> timed_events_;
  std::uintptr_t next_event_ = 1;

  std::atomic<bool> failed_ = false;
  mutable std::mutex error_mutex_;
  bool ordered_ = false;
  std::string problem_;

  std::atomic<std::thread::id> recording_;
  std::atomic<std::int64_t> ops_ = 0;
  std::atomic<std::int64_t> bodies_ = 0;
  std::atomic<std::int64_t> replayed_ = 0;
  std::atomic<std::int64_t> host_waits_ = 0;
  std::atomic<std::int64_t> unpinned_ = 0;
};

}  // namespace dsfp4::ops::testing
