// One fault at the N-th read of a reader, for the tests that go over every N.
#pragma once

#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <fcntl.h>
#include <mutex>
#include <string>
#include <thread>
#include <unistd.h>

#include "storage/reader_fixture.h"

namespace dsfp4::storage {

enum class Fault {
  kNone,
  kIoErrorOnce,
  kIoErrorForever,  // of everything from the N-th read on
  kShort,           // half of what was asked for, at a block's border
  kShortInBlock,    // ends within a block
  kInterrupted,
  kAgain,
  kNoMemory,
  kTruncated,        // the file loses its second half
  kRewritten,        // another byte in place, same size
  kReplaced,         // renamed over: the reader keeps the file that it opened
  kStallThenGoesOn,  // long enough for a warning
  kStallForever,     // given up
  kBitFlip,          // in what was read: nobody but a checksum can see it
};
/// Those that a reader itself can deal with.
constexpr Fault kAllFaults[] = {
    Fault::kIoErrorOnce, Fault::kIoErrorForever, Fault::kShort,           Fault::kShortInBlock,
    Fault::kInterrupted, Fault::kAgain,          Fault::kNoMemory,        Fault::kTruncated,
    Fault::kRewritten,   Fault::kReplaced,       Fault::kStallThenGoesOn, Fault::kStallForever};

/// Whether a load with this fault must give the right bytes, or must fail.
inline bool must_succeed(Fault fault) {
  return fault != Fault::kIoErrorForever && fault != Fault::kTruncated &&
         fault != Fault::kRewritten && fault != Fault::kStallForever;
}

/// Injects `fault` at read number `at` (from 0), and at the next ones if `reads` > 1. Stalls are
/// reads of a pipe that nobody writes to.
class FaultAt final : public FaultSystem {
 public:
  /// `path` is the file that kTruncated, kRewritten and kReplaced change.
  FaultAt(Fault fault, std::int64_t at, std::string path, std::int64_t reads = 1)
      : fault_(fault), at_(at), most_(reads), path_(std::move(path)) {
    before = [this](ReadCall& call) { return inject(call); };
    after = [this](const ReadCall& call, int result) { return alter(call, result); };
    if (fault == Fault::kStallThenGoesOn || fault == Fault::kStallForever) {
      if (::pipe2(pipe_, O_CLOEXEC) != 0) std::abort();
    }
  }
  ~FaultAt() override {
    hang_up();
    if (pipe_[0] >= 0) ::close(pipe_[0]);
  }
  std::int64_t reads() const { return reads_.load(); }
  bool injected() const { return injected_.load(); }

  /// Ends the stall.
  void hang_up() {
    const std::lock_guard lock(mutex_);
    if (pipe_[1] >= 0) ::close(pipe_[1]);
    pipe_[1] = -1;
  }
  bool stalling() {
    const std::lock_guard lock(mutex_);
    return pipe_[1] >= 0;
  }
  /// Ends the stall once its reader is gone, and waits for the thread that it may have left behind:
  /// closing the files is the last that it does.
  void wait_for_threads() {
    hang_up();
    while (open_files > 0) std::this_thread::yield();
  }
  ssize_t pread(const ReadCall& call) override {
    if (call.descriptor != pipe_[0] || pipe_[0] < 0) return System::pread(call);
    const ssize_t got = ::read(call.descriptor, call.buffer, call.bytes);
    return got >= 0 ? got : -errno;
  }

 private:
  std::optional<int> inject(ReadCall& call) {
    const std::int64_t number = reads_++;
    if (fault_ == Fault::kIoErrorForever && number >= at_) {
      injected_ = true;
      return -EIO;
    }
    if (number < at_ || number >= at_ + most_ || fault_ == Fault::kNone) return std::nullopt;
    if (pipe_[0] >= 0 && !stalling()) return std::nullopt;
    injected_ = true;
    switch (fault_) {
      case Fault::kIoErrorOnce:
        return -EIO;
      case Fault::kInterrupted:
        return -EINTR;
      case Fault::kAgain:
        return -EAGAIN;
      case Fault::kNoMemory:
        return -ENOMEM;
      case Fault::kShort:
      case Fault::kShortInBlock:
      case Fault::kBitFlip:
        shorten_ = call.offset;
        return std::nullopt;
      case Fault::kTruncated:
        if (::truncate(path_.c_str(), static_cast<off_t>(size() / 2)) != 0) std::abort();
        return std::nullopt;
      case Fault::kRewritten:
        rewrite(path_);
        return std::nullopt;
      case Fault::kReplaced:
        std::filesystem::copy_file(path_, path_ + ".new");
        rewrite(path_ + ".new");
        std::filesystem::rename(path_ + ".new", path_);
        return std::nullopt;
      case Fault::kStallThenGoesOn:
        clock_offset_ms += 20'000;
        break;
      case Fault::kStallForever:
        clock_offset_ms += 100'000;
        break;
      default:
        std::abort();
    }
    call.descriptor = pipe_[0];
    return std::nullopt;
  }
  int alter(const ReadCall& call, int result) {
    if (pipe_[0] >= 0 && call.descriptor == pipe_[0]) return result == 0 ? -EAGAIN : result;
    std::uint64_t shortened = call.offset;
    if (result <= 0 || !shorten_.compare_exchange_strong(shortened, kNowhere)) return result;
    const int half = result / 2;
    if (fault_ == Fault::kBitFlip) {
      call.buffer[half] ^= std::byte{8};
      return result;
    }
    return fault_ == Fault::kShort ? std::max(half & ~4095, std::min(result, 4096)) : half + 1;
  }
  std::uint64_t size() const { return std::filesystem::file_size(path_); }
  static void rewrite(const std::string& path) {
    const int file = ::open(path.c_str(), O_WRONLY | O_CLOEXEC);
    if (file < 0 || ::pwrite(file, "\x7f", 1, 1234) != 1) std::abort();
    ::close(file);
  }

  static constexpr std::uint64_t kNowhere = ~std::uint64_t{0};
  Fault fault_;
  std::int64_t at_;
  std::int64_t most_;
  std::string path_;
  std::atomic<std::int64_t> reads_ = 0;
  std::atomic<bool> injected_ = false;
  std::atomic<std::uint64_t> shorten_ = kNowhere;
  std::mutex mutex_;
  int pipe_[2] = {-1, -1};
};

}  // namespace dsfp4::storage
