// The two readers behind make_reader().
#pragma once

#include <filesystem>
#include <memory>
#include <vector>

#include "storage/reader.h"

namespace dsfp4::storage {

/// Reads with pread(2), from `options.depth` threads for each device.
std::unique_ptr<Reader> make_pread_reader(const std::vector<std::filesystem::path>& files,
                                          const ReaderOptions& options);

/// Reads with io_uring, `options.depth` reads at a time for each device. Throws UnsupportedError
/// where that is not permitted.
std::unique_ptr<Reader> make_uring_reader(const std::vector<std::filesystem::path>& files,
                                          const ReaderOptions& options);

}  // namespace dsfp4::storage
