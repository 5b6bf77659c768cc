// Reads file extents into given buffers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <vector>

namespace dsfp4::storage {

/// `bytes` bytes at `offset` of file number `file`, to be written to `destination`.
struct Extent {
  std::uint32_t file = 0;
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
  std::byte* destination = nullptr;
};

/// Called from a reading thread as bytes arrive, with the total so far; calls never overlap.
/// An exception thrown by it ends the read and leaves through it.
using ReadProgress = std::function<void(std::uint64_t bytes_done)>;

class Reader {
 public:
  virtual ~Reader() = default;
  /// Reads all extents; returns when every one is complete. Short reads are resumed and EINTR and
  /// EAGAIN retried. Throws IoError with file, offset and errno where the system refuses, and
  /// where a file ends before an extent does ("truncated"). On an error no buffer is written any
  /// more once the call has returned. Safe to call from several threads.
  virtual void read(std::span<const Extent> extents, const ReadProgress& progress) = 0;
};

/// Opens `files` (for the Extent's file numbers) and reads them with pread(2) from `threads` >= 1
/// threads. Throws IoError for a file that cannot be opened.
std::unique_ptr<Reader> make_pread_reader(const std::vector<std::filesystem::path>& files,
                                          int threads);

}  // namespace dsfp4::storage
