#include "base/files.h"

#include <cerrno>
#include <fcntl.h>
#include <unistd.h>
#include <utility>

#include "dsfp4/error.h"

namespace dsfp4 {
namespace {

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
    for (off_t at = 0; !bytes.empty();) {
      const ssize_t written = ::pwrite(descriptor_, bytes.data(), bytes.size(), at);
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) throw IoError(path_, at, errno, "cannot be written");
      bytes.remove_prefix(static_cast<std::size_t>(written));
      at += written;
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

}  // namespace

FileIdentity FileIdentity::of(const struct stat& status) noexcept {
  constexpr std::int64_t kNanoseconds = 1'000'000'000;
  return {status.st_dev, status.st_ino, static_cast<std::uint64_t>(status.st_size),
          status.st_mtim.tv_sec * kNanoseconds + status.st_mtim.tv_nsec};
}

std::string read_whole_file(const std::filesystem::path& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) return "";
  std::string text;
  char part[4096];
  for (;;) {
    const ssize_t got = ::read(descriptor, part, sizeof(part));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) break;
    text.append(part, static_cast<std::size_t>(got));
  }
  ::close(descriptor);
  return text;
}

void replace_file(const std::filesystem::path& path, std::string_view bytes) {
  // One name a process: two that write at once do not write into each other's file.
  Temporary temporary(path.string() + "." + std::to_string(::getpid()) + ".part");
  temporary.write(bytes);
  temporary.rename_to(path.string());
}

}  // namespace dsfp4
