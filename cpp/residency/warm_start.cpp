#include "residency/warm_start.h"

#include <array>
#include <cstdio>
#include <cstring>
#include <string>
#include <system_error>
#include <utility>

#include "base/files.h"
#include "dsfp4/error.h"

namespace dsfp4::residency {
namespace {

constexpr std::array<char, 8> kMagic{'d', 's', 'f', 'p', '4', 'w', 's', '1'};
constexpr std::uint64_t kMostBytes = std::uint64_t{1} << 30;

// FNV-1a: finds torn and damaged files; nobody has a reason to forge one.
std::uint64_t checksum(std::string_view bytes) {
  std::uint64_t hash = 0xcbf29ce484222325;
  for (const char c : bytes) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return hash;
}

void append(std::string& to, const void* data, std::size_t bytes) {
  to.append(static_cast<const char*>(data), bytes);
}

template <typename T>
bool take(std::string_view& from, T& value) {
  if (from.size() < sizeof(T)) return false;
  from.copy(reinterpret_cast<char*>(&value), sizeof(T));
  from.remove_prefix(sizeof(T));
  return true;
}

// The file's bytes without their checksum, if that is right.
std::optional<std::string> read_checked(const std::filesystem::path& path) {
  std::error_code error;
  const std::uintmax_t size = std::filesystem::file_size(path, error);
  if (error || size > kMostBytes || size < sizeof(std::uint64_t)) return std::nullopt;
  std::string bytes = read_whole_file(path);
  if (bytes.size() != size) return std::nullopt;

  std::string_view end = std::string_view(bytes).substr(bytes.size() - sizeof(std::uint64_t));
  std::uint64_t sum = 0;
  if (!take(end, sum)) return std::nullopt;
  bytes.resize(bytes.size() - sizeof(std::uint64_t));
  if (sum != checksum(bytes)) return std::nullopt;
  return bytes;
}

}  // namespace

std::filesystem::path warm_start_path(const std::filesystem::path& folder,
                                      std::uint64_t fingerprint) {
  std::array<char, 17> hex{};
  std::snprintf(hex.data(), hex.size(), "%016llx", static_cast<unsigned long long>(fingerprint));
  return folder / (std::string(hex.data()) + ".experts");
}

void save_warm_start(const std::filesystem::path& path, std::uint64_t fingerprint,
                     std::string_view policy, std::span<const float> state) {
  std::string bytes;
  append(bytes, kMagic.data(), kMagic.size());
  append(bytes, &fingerprint, sizeof(fingerprint));
  const std::uint64_t name = policy.size();
  append(bytes, &name, sizeof(name));
  append(bytes, policy.data(), policy.size());
  const std::uint64_t count = state.size();
  append(bytes, &count, sizeof(count));
  append(bytes, state.data(), state.size_bytes());
  const std::uint64_t sum = checksum(bytes);
  append(bytes, &sum, sizeof(sum));

  make_folder(path.parent_path());
  replace_file(path, bytes);
}

bool is_whole_warm_start(const std::filesystem::path& path) {
  return read_checked(path).has_value();
}

std::optional<std::vector<float>> load_warm_start(const std::filesystem::path& path,
                                                  std::uint64_t fingerprint,
                                                  std::string_view policy) {
  const std::optional<std::string> bytes = read_checked(path);
  if (!bytes) return std::nullopt;
  std::string_view rest(*bytes);
  std::array<char, kMagic.size()> magic{};
  std::uint64_t owner = 0;
  std::uint64_t count = 0;
  if (!take(rest, magic) || magic != kMagic || !take(rest, owner) || owner != fingerprint) {
    return std::nullopt;
  }
  if (!take(rest, count) || count > rest.size() || rest.substr(0, count) != policy) {
    return std::nullopt;
  }
  rest.remove_prefix(count);
  if (!take(rest, count) || rest.size() % sizeof(float) != 0 ||
      count != rest.size() / sizeof(float)) {
    return std::nullopt;
  }
  std::vector<float> state(count);
  std::memcpy(state.data(), rest.data(), rest.size());
  return state;
}

WarmStart::WarmStart(const std::filesystem::path& folder, std::uint64_t fingerprint,
                     std::string policy)
    : path_(warm_start_path(folder, fingerprint)),
      fingerprint_(fingerprint),
      policy_(std::move(policy)) {}

std::optional<std::vector<float>> WarmStart::load() {
  const std::lock_guard lock(mutex_);
  saved_ = load_warm_start(path_, fingerprint_, policy_);
  return saved_;
}

void WarmStart::save(std::vector<float> state, Clock::time_point now) {
  const std::lock_guard lock(mutex_);
  if (saved_at_ && now - *saved_at_ < kPeriod) return;
  if (write(std::move(state))) saved_at_ = now;
}

void WarmStart::save_last(std::vector<float> state) {
  const std::lock_guard lock(mutex_);
  write(std::move(state));
}

bool WarmStart::write(std::vector<float> state) {
  if (failed_ || saved_ == state) return false;
  failed_ = true;
  save_warm_start(path_, fingerprint_, policy_, state);
  failed_ = false;
  saved_ = std::move(state);
  return true;
}

}  // namespace dsfp4::residency
