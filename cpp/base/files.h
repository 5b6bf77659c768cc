// Small files: what the system says of itself, and files that are replaced in one step. Without
// <fstream>: a library that carries its own C++ runtime into a process that has another one cannot
// use streams.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <sys/stat.h>

namespace dsfp4 {

/// Tells whether a file is still the one that it was, and unchanged.
struct FileIdentity {
  std::uint64_t device = 0;
  std::uint64_t inode = 0;
  std::uint64_t bytes = 0;
  std::int64_t changed_ns = 0;  // time of the last change of its content

  static FileIdentity of(const struct stat& status) noexcept;
  bool operator==(const FileIdentity&) const = default;
};

/// All bytes of a file, also of one of /proc or /sys; what there is where it cannot be read on.
std::string read_whole_file(const std::filesystem::path& path);

/// Makes the folder, and those above it, unless they are there. Throws IoError.
void make_folder(const std::filesystem::path& folder);

/// Makes `path` hold `bytes`, durably and in one step: whoever reads it, also after a crash, finds
/// the old file or the new one. Several may do so at once, the last one's stays. Deletes what a
/// writer that was killed has left beside it. Throws IoError.
void replace_file(const std::filesystem::path& path, std::string_view bytes);

}  // namespace dsfp4
