#include "checkpoint/file.h"

#include <cerrno>
#include <fcntl.h>
#include <sys/stat.h>
#include <system_error>
#include <unistd.h>
#include <utility>

#include "checkpoint/absence.h"
#include "dsfp4/error.h"

namespace dsfp4::checkpoint {

InputFile::InputFile(std::string name, int descriptor)
    : name_(std::move(name)), descriptor_(descriptor) {}

InputFile::InputFile(InputFile&& other) noexcept
    : name_(std::move(other.name_)),
      descriptor_(std::exchange(other.descriptor_, -1)),
      identity_(other.identity_) {}

InputFile::~InputFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

std::optional<InputFile> InputFile::open_if_exists(const std::filesystem::path& path) {
  std::string name = path.string();
  int descriptor = -1;
  do {  // O_NONBLOCK: opening a pipe must not wait for its other end
    descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  } while (descriptor < 0 && errno == EINTR);
  if (descriptor < 0) {
    if (errno == ENOENT) return std::nullopt;
    throw IoError(std::move(name), -1, errno, "cannot be opened");
  }
  InputFile file(std::move(name), descriptor);
  struct stat status {};
  if (::fstat(descriptor, &status) != 0) {
    throw IoError(file.name_, -1, errno, "its size cannot be read");
  }
  if (!S_ISREG(status.st_mode)) throw CheckpointError(file.name_, "", -1, "is not a regular file");
  file.identity_ = FileIdentity::of(status);
  return file;
}

std::string InputFile::read(std::uint64_t offset, std::size_t bytes) const {
  std::string data(bytes, '\0');
  std::size_t done = 0;
  while (done < bytes) {
    const auto at = static_cast<off_t>(offset + done);
    const ssize_t count = ::pread(descriptor_, data.data() + done, bytes - done, at);
    if (count < 0) {
      if (errno == EINTR) continue;
      throw IoError(name_, at, errno, "the read failed");
    }
    if (count == 0) {
      throw CheckpointError(name_, "", at,
                            "the file ends here, inside its header: it is truncated or was changed "
                            "while it was read");
    }
    done += static_cast<std::size_t>(count);
  }
  return data;
}

std::optional<std::string> read_file_if_exists(const std::filesystem::path& path,
                                               std::uint64_t max_bytes) {
  const std::optional<InputFile> file = InputFile::open_if_exists(path);
  if (!file) {
    std::error_code ignored;  // where the link cannot be looked at, opening would have failed
    if (!std::filesystem::is_symlink(path, ignored)) return std::nullopt;
    throw IoError(path.string(), -1, ENOENT, describe_absence(path));
  }
  if (file->size() > max_bytes) {
    throw CheckpointError(file->name(), "", -1,
                          "has " + std::to_string(file->size()) + " bytes; the limit is " +
                              std::to_string(max_bytes));
  }
  std::string text = file->read(0, file->size());
  if (const std::string pointer = describe_lfs_pointer(text, file->size()); !pointer.empty()) {
    throw CheckpointError(file->name(), "", -1, pointer);
  }
  return text;
}

}  // namespace dsfp4::checkpoint
