// Reads every byte of a checkpoint's tensors: are the numbers finite, and the bytes still those
// that were hashed?
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "base/poll.h"
#include "storage/reader.h"

namespace dsfp4::engine {

struct TensorProblem {
  std::string file;
  std::string tensor;
  std::int64_t offset = 0;  // of the first byte at fault, in `file`
  std::string problem;
};

struct VerifyReport {
  std::int64_t files = 0;
  std::int64_t tensors = 0;
  std::uint64_t bytes = 0;
  bool compared = false;                // there was a checksum sidecar
  bool wrote = false;                   // a new one was written
  std::vector<TensorProblem> problems;  // in the order of the files
};

/// Takes 8 MiB for each of `threads` >= 1, however large the checkpoint, and the process's threads
/// for some milliseconds at a time. With `write`, and no problem found, the sidecar is written.
/// `progress` (may be empty) gets bytes done and bytes in all, on the calling thread; `poll` is
/// asked between pieces of work and while this waits for reads. Throws CheckpointError for
/// malformed headers and sidecars, IoError, what `progress` and `poll` throw and, before anything
/// is read, what loading would throw for the configuration, a tensor that is missing or one that is
/// not understood. `reading`: how the files are read.
VerifyReport verify(const std::filesystem::path& folder, int threads, bool write,
                    const std::function<void(std::uint64_t, std::uint64_t)>& progress,
                    const Poll& poll = {}, const storage::ReaderOptions& reading = {});

}  // namespace dsfp4::engine
