// A timeline of what an engine did, as a file that Perfetto (ui.perfetto.dev) and chrome://tracing
// open: the JSON array of Chrome's trace event format.
#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <mutex>
#include <string>
#include <string_view>

namespace dsfp4 {

/// All functions may be called from any thread. Spans are kept in memory and written some hundred
/// kilobytes at a time; the file is whole when the trace ends, and can be opened before that.
class Trace {
 public:
  using Clock = std::chrono::steady_clock;
  /// Spans of kReads may overlap each other; those of another track come from one thread at a time.
  /// kCompute is the processor's, kReads are the SSD's, kCopies go over PCIe, kDevice is a GPU's.
  enum class Track : std::uint8_t { kSteps, kCompute, kWaits, kReads, kCopies, kDevice };

  /// Replaces the file. Throws IoError.
  explicit Trace(const std::filesystem::path& path);
  ~Trace();
  Trace(const Trace&) = delete;
  Trace& operator=(const Trace&) = delete;

  /// `name`: letters, digits, blanks. `bytes`, if there are any, become an argument of the span.
  /// What cannot be written is dropped, and said once.
  void span(Track track, std::string_view name, Clock::time_point start, Clock::time_point end,
            std::uint64_t bytes = 0) noexcept;

 private:
  void add(Track track, std::string_view name, Clock::time_point start, Clock::time_point end,
           std::uint64_t bytes);
  void write() noexcept;
  std::int64_t microseconds(Clock::time_point time) const;

  int descriptor_;
  std::int64_t written_ = 0;
  Clock::time_point begin_ = Clock::now();
  std::mutex mutex_;
  std::string text_;
  std::uint64_t reads_ = 0;
};

}  // namespace dsfp4
