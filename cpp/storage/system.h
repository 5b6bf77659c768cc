// What the readers ask of the operating system, as one interface: tests put faults in here.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <sys/stat.h>
#include <sys/types.h>
#include <thread>

namespace dsfp4::storage {

/// One read(2)-like call that is about to be made, or was made.
struct ReadCall {
  std::uint32_t file = 0;  // the reader's number of the file
  int descriptor = -1;     // a replacement is used instead of the file
  std::uint64_t offset = 0;
  std::byte* buffer = nullptr;
  std::size_t bytes = 0;
};

/// The real system; every function may be overridden. Functions return -errno for a failure.
class System {
 public:
  using Clock = std::chrono::steady_clock;

  virtual ~System() = default;
  virtual int open(const std::string& path, int flags);
  virtual void close(int descriptor) noexcept;
  virtual int status(int descriptor, struct stat& status);
  virtual ssize_t pread(const ReadCall& call);
  /// 0 if io_uring may be used.
  virtual int allow_uring() { return 0; }
  /// Called before each read; a result given here is taken in place of the read.
  virtual std::optional<int> before_read(ReadCall&) { return std::nullopt; }
  /// Called after each read that was made, with its result (bytes or -errno); returns the result to
  /// go on with, which may be less.
  virtual int after_read(const ReadCall&, int result) { return result; }
  /// Throws std::system_error where the system starts no more threads.
  virtual std::thread start(std::function<void()> body);
  virtual Clock::time_point now() { return Clock::now(); }
  /// How often reads in flight are looked at for stalls.
  virtual std::chrono::milliseconds watch_period() { return std::chrono::milliseconds(500); }

  static System& real();
};

}  // namespace dsfp4::storage
