// An io_uring that belongs to one thread, as small as the reader needs it.
#pragma once

#include <cstdint>
#include <liburing.h>
#include <optional>
#include <span>

#include "dsfp4/error.h"
#include "storage/system.h"

namespace dsfp4::storage {

/// The error that says why io_uring cannot be used, from an errno value.
UnsupportedError uring_not_permitted(int error);

/// Lets a thread that waits in Uring::wait() go on, from any thread. May outlive the ring.
class Wakeup {
 public:
  /// Throws UnsupportedError.
  Wakeup();
  ~Wakeup();
  Wakeup(const Wakeup&) = delete;
  Wakeup& operator=(const Wakeup&) = delete;

  void notify() noexcept;
  int descriptor() const noexcept { return event_; }

 private:
  int event_;
};

class Uring {
 public:
  using Clock = System::Clock;

  /// For `entries` reads at once; `wakeup` must outlive it. Throws UnsupportedError where the
  /// system does not permit it. Must be used from the thread that made it.
  Uring(unsigned entries, const Wakeup& wakeup);
  ~Uring();
  Uring(const Uring&) = delete;
  Uring& operator=(const Uring&) = delete;

  /// False if the system refuses; then descriptors are given with each read.
  bool register_files(std::span<const int> descriptors) noexcept;
  /// How many buffers of `bytes` bytes from `memory` on could be registered, at most `count`: each
  /// counts against RLIMIT_MEMLOCK.
  std::size_t register_buffers(std::byte* memory, std::uint64_t bytes, std::size_t count);

  struct Read {
    int descriptor = -1;  // or its number among the registered ones
    bool registered_file = false;
    int registered_buffer = -1;  // that holds `to`, or -1
    std::byte* to = nullptr;
    std::uint32_t bytes = 0;
    std::uint64_t offset = 0;
  };
  /// Prepares a read; it starts with the next wait(). `id` must be below 2^62.
  void read(std::uint64_t id, const Read& read) noexcept;
  /// Asks for the read `id` to end early, with -ECANCELED.
  void cancel(std::uint64_t id) noexcept;

  /// Submits what is prepared and waits until at least one read is over, the wakeup is notified, or
  /// `most` has passed (if given).
  void wait(std::optional<Clock::duration> most) noexcept;
  /// Calls `use(id, result)` for all reads that are over; true if the wakeup was notified.
  template <typename Use>
  bool completions(const Use& use) {
    bool woken = false;
    io_uring_cqe* entry = nullptr;
    while (io_uring_peek_cqe(&ring_, &entry) == 0) {
      const std::uint64_t id = entry->user_data;
      const int result = entry->res;
      io_uring_cqe_seen(&ring_, entry);
      if (id == kWake) {
        woken = true;
        listen();
      } else if (id != kIgnored) {
        use(id, result);
      }
    }
    return woken;
  }

 private:
  static constexpr std::uint64_t kWake = ~std::uint64_t{0} - 1;  // liburing's own is ~0
  static constexpr std::uint64_t kIgnored = ~std::uint64_t{0} - 2;

  io_uring_sqe* entry() noexcept;
  void listen() noexcept;

  io_uring ring_{};
  const Wakeup& wakeup_;
  std::uint64_t event_count_ = 0;
};

}  // namespace dsfp4::storage
