// Files of known bytes, a system with faults, and readers of both kinds, for the tests of storage.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "storage/reader.h"
#include "storage/system.h"

namespace dsfp4::storage {

/// The real system with hooks before and after each read, and a clock that can be put forward: to
/// clock_offset_ms in steps at which the watcher over reads looks, or at once by stopped().
class FaultSystem : public System {
 public:
  std::function<std::optional<int>(ReadCall&)> before;
  std::function<int(const ReadCall&, int)> after;
  std::function<void(int descriptor, struct stat&)> alter_status;
  std::atomic<std::int64_t> clock_offset_ms = 0;
  std::atomic<int> uring_error = 0;
  std::atomic<int> open_files = 0;

  int open(const std::string& path, int flags) override {
    const int descriptor = System::open(path, flags);
    if (descriptor >= 0) ++open_files;
    return descriptor;
  }
  void close(int descriptor) noexcept override {
    System::close(descriptor);
    --open_files;
  }
  std::optional<int> before_read(ReadCall& call) override {
    return before ? before(call) : std::nullopt;
  }
  int after_read(const ReadCall& call, int result) override {
    return after ? after(call, result) : result;
  }
  int status(int descriptor, struct stat& status) override {
    const int result = System::status(descriptor, status);
    if (alter_status) alter_status(descriptor, status);
    return result;
  }
  int allow_uring() override { return -uring_error.load(); }
  Clock::time_point now() override {
    return Clock::now() + std::chrono::milliseconds(shown_ms_.load());
  }
  std::chrono::milliseconds watch_period() override {
    const std::int64_t ahead = clock_offset_ms.load() - shown_ms_.load();
    shown_ms_ += std::clamp<std::int64_t>(ahead, 0, 8'000);
    ++looks_;
    return std::chrono::milliseconds(1);
  }
  /// As if the process had been stopped for so long.
  void stopped(std::chrono::milliseconds span) {
    clock_offset_ms += span.count();
    shown_ms_ += span.count();
  }
  /// The clock stays at what it shows.
  void hold_clock() { clock_offset_ms = shown_ms_.load(); }
  /// Waits until the watcher has looked at the reads in flight as they are now.
  void wait_for_a_look() const {
    const std::int64_t before = looks_;
    while (looks_ < before + 3) std::this_thread::yield();
  }

 private:
  std::atomic<std::int64_t> looks_ = 0;
  std::atomic<std::int64_t> shown_ms_ = 0;
};

class ReaderFiles {
 public:
  ReaderFiles() {
    std::string name = std::filesystem::temp_directory_path() / "dsfp4-reader-XXXXXX";
    folder_ = ::mkdtemp(name.data());
  }
  ~ReaderFiles() { std::filesystem::remove_all(folder_); }
  ReaderFiles(const ReaderFiles&) = delete;
  ReaderFiles& operator=(const ReaderFiles&) = delete;

  const std::filesystem::path& folder() const { return folder_; }

  /// A file of `bytes` bytes in which byte i depends on i and on `salt`.
  std::filesystem::path write(const std::string& name, std::size_t bytes, unsigned salt) const {
    std::filesystem::path path = folder_ / name;
    std::string text(bytes, '\0');
    for (std::size_t i = 0; i < bytes; ++i) text[i] = byte(i, salt);
    std::ofstream(path, std::ios::binary) << text;
    return path;
  }
  static char byte(std::size_t i, unsigned salt) {
    return static_cast<char>((i * 2654435761u + salt) >> 7);
  }
  /// Whether `got` is the file's bytes from `offset` on.
  static ::testing::AssertionResult same(const std::byte* got, std::size_t bytes,
                                         std::size_t offset, unsigned salt) {
    for (std::size_t i = 0; i < bytes; ++i) {
      if (static_cast<char>(got[i]) != byte(offset + i, salt)) {
        return ::testing::AssertionFailure() << "byte " << offset + i << " is wrong";
      }
    }
    return ::testing::AssertionSuccess();
  }
  static std::ptrdiff_t open_descriptors() {
    return std::distance(std::filesystem::directory_iterator("/proc/self/fd"),
                         std::filesystem::directory_iterator{});
  }

 private:
  std::filesystem::path folder_;
};

/// Memory whose data() has a given phase modulo kBlockBytes, with a block of slack on both sides.
class PhasedBuffer {
 public:
  PhasedBuffer(std::size_t bytes, std::uint64_t phase)
      : memory_(bytes + 4 * kBlockBytes, std::byte{0x5a}), bytes_(bytes) {
    const auto start = reinterpret_cast<std::uintptr_t>(memory_.data()) + kBlockBytes;
    offset_ = kBlockBytes + (phase - start % kBlockBytes + kBlockBytes) % kBlockBytes;
  }
  std::byte* data() { return memory_.data() + offset_; }
  std::size_t size() const { return bytes_; }
  /// Whether nothing was written outside [data(), data() + size()).
  bool surroundings_untouched() const {
    for (std::size_t i = 0; i < memory_.size(); ++i) {
      if (i >= offset_ && i < offset_ + bytes_) continue;
      if (memory_[i] != std::byte{0x5a}) return false;
    }
    return true;
  }

 private:
  std::vector<std::byte> memory_;
  std::size_t bytes_;
  std::size_t offset_;
};

/// A test for each kind of reader. Where io_uring is not permitted its half is skipped, and says
/// so.
class ReaderTest : public ::testing::TestWithParam<ReaderKind> {
 protected:
  void SetUp() override {
    if (GetParam() != ReaderKind::kUring) return;
    try {
      ReaderOptions uring;
      uring.kind = ReaderKind::kUring;
      make_reader({}, uring);
    } catch (const std::exception& error) {
      GTEST_SKIP() << error.what();
    }
  }

  /// Options for small files: reads of 4 KiB pieces, so that even 64 KiB take many.
  ReaderOptions options(std::uint64_t piece_bytes = kBlockBytes) {
    ReaderOptions options;
    options.kind = GetParam();
    options.depth = 8;
    options.piece_bytes = piece_bytes;
    options.system = &system_;
    options.log = [this](std::string_view line) {
      const std::lock_guard lock(log_mutex_);
      log_ += line;
      log_ += '\n';
    };
    return options;
  }
  std::string log() {
    const std::lock_guard lock(log_mutex_);
    return log_;
  }

  ReaderFiles files_;
  FaultSystem system_;

 private:
  std::mutex log_mutex_;
  std::string log_;
};

inline std::string kind_name(const ::testing::TestParamInfo<ReaderKind>& info) {
  return info.param == ReaderKind::kUring ? "Uring" : "Pread";
}

}  // namespace dsfp4::storage
