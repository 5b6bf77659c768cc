// A file that remembers how experts were used, so that the next start knows what to cache.
//
// Written whole or not at all: to a temporary file, made durable, then renamed. A file that is
// damaged, or of another checkpoint or policy, is ignored. Nobody needs it: it may be deleted at
// any time.
#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <mutex>
#include <optional>
#include <span>
#include <string>
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

/// The file of a model that runs: written when there is something new, and not for every request.
/// All functions may be called from any thread.
class WarmStart {
 public:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::seconds kPeriod{60};

  /// For the file of the checkpoint `fingerprint` in `folder`.
  WarmStart(const std::filesystem::path& folder, std::uint64_t fingerprint, std::string policy);

  std::optional<std::vector<float>> load();
  /// Saves `state` unless it was saved last, or something was less than kPeriod ago. Throws
  /// IoError, and does nothing from then on.
  void save(std::vector<float> state, Clock::time_point now);
  /// The same, however short ago.
  void save_last(std::vector<float> state);

 private:
  bool write(std::vector<float> state);  // false: there was no need to

  const std::filesystem::path path_;
  const std::uint64_t fingerprint_;
  const std::string policy_;
  std::mutex mutex_;
  bool failed_ = false;                      // guarded by mutex_, as what follows
  std::optional<std::vector<float>> saved_;  // what the file holds
  std::optional<Clock::time_point> saved_at_;
};

}  // namespace dsfp4::residency
