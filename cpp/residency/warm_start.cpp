#include "residency/warm_start.h"

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <fstream>
#include <string>
#include <system_error>
#include <unistd.h>

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
  std::memcpy(&value, from.data(), sizeof(T));
  from.remove_prefix(sizeof(T));
  return true;
}

// A descriptor that is closed, and a file that is deleted unless it was renamed.
class Temporary {
 public:
  explicit Temporary(std::string path)
      : path_(std::move(path)),
        descriptor_(::open(path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)) {
    if (descriptor_ < 0) throw IoError(path_, -1, errno, "cannot be made");
  }
  ~Temporary() {
    if (descriptor_ >= 0) ::close(descriptor_);
    if (!renamed_) ::unlink(path_.c_str());
  }
  Temporary(const Temporary&) = delete;
  Temporary& operator=(const Temporary&) = delete;

  void write(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t written = ::write(descriptor_, bytes.data(), bytes.size());
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) throw IoError(path_, -1, errno, "cannot be written");
      bytes.remove_prefix(static_cast<std::size_t>(written));
    }
    if (::fsync(descriptor_) != 0) throw IoError(path_, -1, errno, "cannot be made durable");
  }
  void rename_to(const std::string& path) {
    if (::rename(path_.c_str(), path.c_str()) != 0) {
      throw IoError(path, -1, errno, "cannot be replaced");
    }
    renamed_ = true;
  }

 private:
  std::string path_;
  int descriptor_;
  bool renamed_ = false;
};

// The file's bytes without their checksum, if that is right.
std::optional<std::string> read_checked(const std::filesystem::path& path) {
  std::error_code error;
  const std::uintmax_t size = std::filesystem::file_size(path, error);
  if (error || size > kMostBytes || size < sizeof(std::uint64_t)) return std::nullopt;
  std::string bytes(static_cast<std::size_t>(size), '\0');
  std::ifstream file(path, std::ios::binary);
  if (!file.read(bytes.data(), static_cast<std::streamsize>(size))) return std::nullopt;

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

  std::error_code error;
  std::filesystem::create_directories(path.parent_path(), error);
  if (error) {
    throw IoError(path.parent_path().string(), -1, error.value(), "the folder cannot be made");
  }
  // One name a process: two that save at once do not write into each other's file.
  Temporary temporary(path.string() + "." + std::to_string(::getpid()) + ".part");
  temporary.write(bytes);
  temporary.rename_to(path.string());
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

}  // namespace dsfp4::residency
