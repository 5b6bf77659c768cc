#include "base/files.h"

#include <atomic>
#include <cerrno>
#include <fcntl.h>
#include <string>
#include <sys/file.h>
#include <system_error>
#include <unistd.h>

#include "dsfp4/error.h"

namespace dsfp4 {
namespace {

constexpr std::string_view kTemporary = ".part";

// Locked as long as its writer lives, so that one without a lock is a leftover; a file system
// without locks keeps its leftovers.
bool lock(int descriptor) noexcept { return ::flock(descriptor, LOCK_EX | LOCK_NB) == 0; }

bool has_links(int descriptor) noexcept {
  struct stat status {};
  return ::fstat(descriptor, &status) == 0 && status.st_nlink > 0;
}

// Deletes what writers of `path` that were killed have left.
void remove_leftovers(const std::filesystem::path& path) {
  const std::string begin = path.filename().string() + ".";
  std::error_code error;
  std::filesystem::directory_iterator entry(
      path.has_parent_path() ? path.parent_path() : std::filesystem::path("."), error);
  for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    if (!name.starts_with(begin) || !name.ends_with(kTemporary)) continue;
    const int descriptor = ::open(entry->path().c_str(), O_WRONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor < 0) continue;
    if (lock(descriptor)) ::unlink(entry->path().c_str());
    ::close(descriptor);
  }
}

// A file beside `path` of a name that nobody else has. It is deleted unless it was renamed.
class Temporary {
 public:
  explicit Temporary(const std::string& path) {
    static std::atomic<std::uint64_t> next = 0;
    do {
      path_ = path + "." + std::to_string(::getpid()) + "-" + std::to_string(next++);
      path_ += kTemporary;
      descriptor_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    } while ((descriptor_ < 0 && errno == EEXIST) || (descriptor_ >= 0 && !take()));
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
  // False if somebody took the new file for a leftover before it was locked.
  bool take() noexcept {
    if (lock(descriptor_) || errno != EWOULDBLOCK) {
      if (has_links(descriptor_)) return true;
    }
    ::close(descriptor_);
    return false;
  }

  std::string path_;
  int descriptor_ = -1;
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

void make_folder(const std::filesystem::path& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) throw IoError(folder.string(), -1, error.value(), "the folder cannot be made");
}

void replace_file(const std::filesystem::path& path, std::string_view bytes) {
  remove_leftovers(path);
  Temporary temporary(path.string());
  temporary.write(bytes);
  temporary.rename_to(path.string());
}

}  // namespace dsfp4
