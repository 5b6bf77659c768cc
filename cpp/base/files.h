// Small files: what the system says of itself, and files that are replaced in one step. Without
// <fstream>: a library that carries its own C++ runtime into a process that has another one cannot
// use streams.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>

namespace dsfp4 {

/// All bytes of a file, also of one of /proc or /sys; what there is where it cannot be read on.
std::string read_whole_file(const std::filesystem::path& path);

/// Makes `path` hold `bytes`, durably and in one step: whoever reads it, also after a crash, finds
/// the old file or the new one. Throws IoError.
void replace_file(const std::filesystem::path& path, std::string_view bytes);

}  // namespace dsfp4
