// Reads extents of files into given buffers, asynchronously.
//
// A request is a set of extents. It is submitted and answered by a ticket; it completes exactly
// once, as done, failed or cancelled, and the completion carries the facts (file, offset, errno).
//
// Threads: every function may be called from any thread. Completion callbacks run on a thread of
// the reader, one at a time for a request; they must be short, must not throw, and may submit,
// promote and cancel, but not wait.
// Memory: the caller owns the destinations, which must live until the ticket is quiet(). That is
// the moment of completion, with one exception: when a read has stalled for longer than the limit,
// the request fails first, and becomes quiet when the system lets go of the buffer. Whoever sets
// ReadRequest::owner need not care: the reader keeps the owner alive until then. A demand that
// could not begin for as long, because such reads hold all there is to read with, fails as well.
// Order: a demand overtakes every speculative read that is not yet with the system. While a demand
// is unfinished no speculative read is submitted, and the bytes of speculation in flight are
// bounded always. Requests of one priority are served in the order they came; different devices are
// served side by side.
// Errors: short reads are resumed, EINTR and EAGAIN are retried, EIO and ENOMEM a few times; then
// the request fails, and nothing but the request. A file that ends before an extent does, and one
// that was changed since it was opened, fail the request too. What a failed or cancelled request's
// buffers hold is undefined.
// Direct reads (O_DIRECT): a destination that is congruent to its file offset modulo kBlockBytes
// is read in place, everything else through staging buffers and copied. An in-place read is aligned
// outward where the extent allows it (Extent::slack); else its first and last block are copied.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/files.h"
#include "base/poll.h"

namespace dsfp4::storage {

class System;
struct RequestState;

/// Direct reads start and end on multiples of this, in the file and in memory.
inline constexpr std::uint64_t kBlockBytes = 4096;

/// `bytes` bytes at `offset` of file number `file`, to be written to `destination`.
struct Extent {
  std::uint32_t file = 0;
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
  std::byte* destination = nullptr;
  /// The blocks around the extent may be overwritten too: up to kBlockBytes - 1 bytes before
  /// `destination` and after its end (a slot of memory::SlotPool has that room).
  bool slack = false;
};

enum class Priority : std::uint8_t { kSpeculative, kDemand };

enum class ReadStatus : std::uint8_t { kPending, kDone, kFailed, kCancelled };

/// How a request ended.
struct ReadResult {
  ReadStatus status = ReadStatus::kPending;
  // For kFailed: what an IoError says.
  std::string file;
  std::int64_t offset = -1;
  int error_number = 0;
  std::string problem;

  /// Throws IoError if the request failed.
  void throw_if_failed() const;
};

struct ReadRequest {
  std::vector<Extent> extents;
  Priority priority = Priority::kDemand;
  /// Called once, when the request completes; see Threads above. May be empty. For a request
  /// without bytes it is called by submit() itself.
  std::function<void(const ReadResult&)> on_complete;
  /// Kept alive until the ticket is quiet: what owns the destinations. May be null.
  std::shared_ptr<void> owner;
};

/// A submitted request; copies stand for the same one. Dropping all of them does not cancel it.
class ReadTicket {
 public:
  ReadTicket() = default;
  explicit ReadTicket(std::shared_ptr<RequestState> state) : state_(std::move(state)) {}

  explicit operator bool() const noexcept { return state_ != nullptr; }
  ReadStatus status() const noexcept;
  /// No read of this request is with the system any more: its buffers are the caller's again. True
  /// of a ticket for nothing.
  bool quiet() const noexcept;
  /// Useful bytes that have arrived so far.
  std::uint64_t bytes_done() const noexcept;

  RequestState& state() const noexcept { return *state_; }
  const std::shared_ptr<RequestState>& shared_state() const noexcept { return state_; }

 private:
  std::shared_ptr<RequestState> state_;
};

/// Counted since the reader was made.
struct ReaderStats {
  std::uint64_t reads = 0;              // completed reads of the system, resumed ones too
  std::uint64_t bytes_read = 0;         // by those, alignment and merged gaps included
  std::uint64_t bytes_useful = 0;       // of extents that were asked for
  std::uint64_t bytes_copied = 0;       // of those, through staging
  std::uint64_t bytes_speculative = 0;  // of those, read while the request was speculative
  std::uint64_t retries = 0;
  std::uint64_t stalls = 0;     // reads that were warned about
  std::uint64_t in_flight = 0;  // reads with the system now
  std::uint64_t in_flight_bytes = 0;
  std::uint64_t held = 0;  // of those, over and held back by bytes_per_second
  std::uint64_t peak_speculative_in_flight_bytes = 0;
  std::uint64_t speculative_beside_demand = 0;  // speculative reads submitted while a demand was
                                                // unfinished: stays 0
  double busy_seconds = 0.0;                    // in which at least one read was with the system
};

/// Called on the thread that waits in Reader::read, with the bytes that have arrived, whenever
/// there are more. An exception thrown by it cancels the read and leaves through it.
using ReadProgress = std::function<void(std::uint64_t bytes_done)>;

class Reader {
 public:
  /// Cancels what is unfinished and waits until all is quiet; a request with an owner whose reads
  /// do not come back within half a second is left to a thread in the background.
  virtual ~Reader() = default;

  /// Takes the request; never waits for a read. Throws ParameterError for a file number or a range
  /// that cannot be, and std::bad_alloc, and then nothing was submitted.
  virtual ReadTicket submit(ReadRequest request) = 0;
  /// Makes a speculative request a demand: what is in flight goes on, nothing is read twice.
  virtual void promote(const ReadTicket& ticket) noexcept = 0;
  /// Drops what is not yet with the system. Completes as kCancelled once the rest has come back,
  /// unless the request ended before; returns at once.
  virtual void cancel(const ReadTicket& ticket) noexcept = 0;
  /// Waits until the request has completed.
  virtual ReadResult wait(const ReadTicket& ticket) = 0;
  /// The same with `poll`: what it throws ends the wait and leaves the request as it is.
  ReadResult wait(const ReadTicket& ticket, const Poll& poll);
  /// Waits at most `most`; false if the request is still pending then.
  virtual bool wait_for(const ReadTicket& ticket, std::chrono::milliseconds most) = 0;

  virtual ReaderStats stats() const = 0;
  /// "io_uring" or "pread".
  virtual const char* name() const noexcept = 0;
  /// Bytes of staging buffers.
  virtual std::uint64_t staging_bytes() const noexcept = 0;

  /// Reads all extents as one demand and waits. Throws IoError, and what `progress` and `poll`
  /// throw, perhaps while the system still has the destinations (see Memory): `owner` owns them. It
  /// may be null where they outlive the reader; then the wait goes on until the read has completed.
  void read(std::span<const Extent> extents, std::shared_ptr<void> owner,
            const ReadProgress& progress = {}, const Poll& poll = {});
};

/// Limits of ReaderOptions::bytes_per_second.
inline constexpr std::uint64_t kSlowestRate = 1'000'000, kFastestRate = 1'000'000'000'000;

enum class ReaderKind : std::uint8_t { kAutomatic, kUring, kPread };

struct ReaderOptions {
  /// Automatic is io_uring where the system permits it, else pread.
  ReaderKind kind = ReaderKind::kAutomatic;
  /// Reads in flight for each device, 1 to 1024; for pread that is its threads.
  int depth = 64;
  /// Large extents are split into reads of so many bytes; a multiple of kBlockBytes, at most 1 GiB.
  std::uint64_t piece_bytes = std::uint64_t{512} << 10;
  /// Most bytes of speculative reads in flight for each device; a single read may exceed it.
  std::uint64_t speculative_bytes = std::uint64_t{8} << 20;
  /// Reads are given back no faster than a disk of this rate would make them, those of demands
  /// first; 0: as they come, else 10^6 to 10^12. For measuring (pace.h).
  std::uint64_t bytes_per_second = 0;
  /// Empty, or what each file must be: one that was replaced or changed since is refused.
  std::vector<FileIdentity> expected;
  /// Pass by the page cache where the file system can.
  bool direct = true;
  /// A read that takes longer is reported, and at the limit given up.
  std::chrono::milliseconds stall_warning{10'000};
  std::chrono::milliseconds stall_limit{60'000};
  /// Receives one plain sentence when something is slower than it could be. May be called from any
  /// thread. Empty: the log of the process (base/log.h).
  std::function<void(std::string_view)> log;
  /// What the reader asks of the operating system; null is the real one. For tests (system.h).
  System* system = nullptr;
};

/// Why io_uring cannot be used here, in one sentence; empty if it can.
std::string uring_problem();

/// Opens `files` (for the Extent's file numbers). Throws IoError for a file that cannot be opened
/// or is not the expected one, ParameterError for options out of range, UnsupportedError for
/// ReaderKind::kUring where io_uring is not permitted.
std::unique_ptr<Reader> make_reader(const std::vector<std::filesystem::path>& files,
                                    const ReaderOptions& options = {});

/// Reader::staging_bytes() of a reader with these options.
std::uint64_t staging_bytes(const ReaderOptions& options) noexcept;

}  // namespace dsfp4::storage
