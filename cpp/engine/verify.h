// Reads every byte of a checkpoint's tensors: are the numbers finite, and the bytes still those
// that were hashed?
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

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

/// Takes a few MiB for each of `threads` >= 1, however large the checkpoint. With `write`, and no
/// problem found, the sidecar is written. `progress` (may be empty) gets bytes done and bytes in
/// all; its calls never overlap. Throws CheckpointError for malformed headers and sidecars, and
/// IoError; and, before anything is read, what loading would throw for the configuration, a tensor
/// that is missing, or one that is not understood.
VerifyReport verify(const std::filesystem::path& folder, int threads, bool write,
                    const std::function<void(std::uint64_t, std::uint64_t)>& progress);

}  // namespace dsfp4::engine
