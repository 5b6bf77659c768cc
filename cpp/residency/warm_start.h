// A file that remembers how experts were used, so that the next start knows what to cache.
//
// Written whole or not at all: to a temporary file, made durable, then renamed. A file that is
// damaged, or of another checkpoint or policy, is ignored. Nobody needs it: it may be deleted at
// any time.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

namespace dsfp4::residency {

/// Where the file of a checkpoint lies in `folder`.
std::filesystem::path warm_start_path(const std::filesystem::path& folder,
                                      std::uint64_t fingerprint);

/// Replaces the file. Makes folders as needed. Throws IoError; the old file is then still there.
void save_warm_start(const std::filesystem::path& path, std::uint64_t fingerprint,
                     std::string_view policy, std::span<const float> state);

/// Nothing if there is no such file, or none that can be used.
std::optional<std::vector<float>> load_warm_start(const std::filesystem::path& path,
                                                  std::uint64_t fingerprint,
                                                  std::string_view policy);

/// Whether the file is whole, whoever it belongs to.
bool is_whole_warm_start(const std::filesystem::path& path);

}  // namespace dsfp4::residency
