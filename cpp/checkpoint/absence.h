// Why a file of a checkpoint is not there, or is not what it should be: a download that stopped, a
// link that leads nowhere, a Git LFS pointer. Each is a part of a sentence that says what to do.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

namespace dsfp4::checkpoint {

/// Continues "<path> ...": "is a link to 'x', which is not there; ...", or "is not there: its
/// download has not ended, ...". Empty if nothing more is known than that it is not there.
std::string describe_absence(const std::filesystem::path& path);

/// A part of a download in `folder` or where the Hub's client keeps it: ": the download has not
/// ended, ...". Empty if there is none.
std::string describe_unfinished(const std::filesystem::path& folder);

/// Continues "<path> ...": "is a Git LFS pointer ..." where a file of `file_bytes` bytes that
/// begins with `begin` is one; else empty.
std::string describe_lfs_pointer(std::string_view begin, std::uint64_t file_bytes);

/// Bytes of a file's begin that describe_lfs_pointer() may look at.
inline constexpr std::uint64_t kMostLfsPointer = 1024;

}  // namespace dsfp4::checkpoint
