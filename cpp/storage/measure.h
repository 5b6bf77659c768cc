// Measures how fast files can be read: the raw rate that everything else is compared with.
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include "storage/reader.h"

namespace dsfp4::storage {

struct RawRate {
  const char* reader = "";  // "io_uring" or "pread"
  std::uint64_t bytes = 0;  // that were read
  double seconds = 0.0;
  double cpu_seconds = 0.0;  // of this process, user and system
  double gb_per_second() const noexcept {
    return seconds > 0.0 ? static_cast<double>(bytes) * 1e-9 / seconds : 0.0;
  }
  double cpu_seconds_per_gb() const noexcept {
    return bytes > 0 ? cpu_seconds / (static_cast<double>(bytes) * 1e-9) : 0.0;
  }
};

/// Reads blocks of options.piece_bytes at random places of `files` for `seconds` (over 0), with
/// options.depth reads at a time, and throws the bytes away. Throws ParameterError if the files
/// together hold fewer than 64 blocks, and what make_reader() and reads throw.
RawRate measure_raw_rate(const std::vector<std::filesystem::path>& files,
                         const ReaderOptions& options, double seconds, std::uint64_t seed = 1);

struct DemandLatency {
  std::vector<double> idle_seconds;    // of each demand, with nothing else to read
  std::vector<double> beside_seconds;  // of each demand that came during speculation
  ReaderStats stats;                   // of the reader that did both
};

/// How long a demand for `experts` experts of `expert_bytes` contiguous bytes at random places
/// takes, alone and while speculation has the queue, in turn, `rounds` times each. Throws
/// ParameterError if the files are too small for it.
DemandLatency measure_demand_beside_speculation(const std::vector<std::filesystem::path>& files,
                                                const ReaderOptions& options,
                                                std::uint64_t expert_bytes, int experts, int rounds,
                                                std::uint64_t seed = 1);

}  // namespace dsfp4::storage
