#include "storage/file_set.h"

#include <algorithm>
#include <cerrno>
#include <fcntl.h>
#include <utility>

#include "dsfp4/error.h"

namespace dsfp4::storage {

FileSet::FileSet(const std::vector<std::filesystem::path>& paths, const ReaderOptions& options,
                 System& system)
    : system_(system), log_(options.log), files_(paths.size()) {
  const std::vector<FileIdentity>& expected = options.expected;
  if (!expected.empty() && expected.size() != paths.size()) {
    throw ParameterError("expected", "must be one for each file");
  }
  try {
    std::vector<std::uint64_t> devices;
    for (std::size_t i = 0; i < paths.size(); ++i) {
      files_[i].path = paths[i].string();
      open(files_[i], options.direct);
      if (!expected.empty() && files_[i].opened != expected[i]) {
        throw IoError(files_[i].path, -1, 0,
                      "was replaced or changed since its header was read; load it again");
      }
      const std::uint64_t device = files_[i].opened.device;
      auto found = std::ranges::find(devices, device);
      if (found == devices.end()) found = devices.insert(devices.end(), device);
      files_[i].lane = static_cast<std::size_t>(found - devices.begin()) % kMaxLanes;
    }
    lanes_ = std::clamp<std::size_t>(devices.size(), 1, kMaxLanes);
  } catch (...) {
    close_all();
    throw;
  }
}

FileSet::~FileSet() { close_all(); }

void FileSet::open(File& file, bool direct) {
  file.descriptor = system_.open(file.path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file.descriptor < 0) throw IoError(file.path, -1, -file.descriptor, "cannot be opened");
  const auto identity = [&](int descriptor) {
    struct stat status {};
    const int refused = system_.status(descriptor, status);
    if (refused < 0) throw IoError(file.path, -1, -refused, "its size cannot be read");
    return FileIdentity::of(status);
  };
  file.opened = identity(file.descriptor);
  if (!direct) return;
  const int descriptor = system_.open(file.path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_DIRECT);
  if (descriptor == -EINVAL || descriptor == -EOPNOTSUPP) {
    say_not_direct(file.path);
    return;
  }
  if (descriptor < 0) throw IoError(file.path, -1, -descriptor, "cannot be opened");
  file.direct_descriptor = descriptor;
  if (identity(descriptor) != file.opened) {
    throw IoError(file.path, -1, 0, "was replaced while it was opened");
  }
  file.direct = true;
}

void FileSet::close_all() noexcept {
  for (File& file : files_) {
    if (file.descriptor >= 0) system_.close(file.descriptor);
    if (file.direct_descriptor >= 0) system_.close(file.direct_descriptor);
  }
}

void FileSet::say_not_direct(const std::string& path) noexcept {
  if (!log_ || said_not_direct_.exchange(true)) return;
  try {
    log_(path +
         ": its file system has no direct reads (O_DIRECT); reading through the page cache, which "
         "is slower and takes memory that the system may have to reclaim");
  } catch (...) {  // NOLINT(bugprone-empty-catch): a read is worth more than a message
  }
}

void FileSet::refuse_direct(std::uint32_t file) noexcept {
  files_[file].direct.store(false, std::memory_order_relaxed);
  say_not_direct(files_[file].path);
}

bool FileSet::size_now(std::uint32_t file, std::uint64_t& bytes) const noexcept {
  struct stat now {};
  const int refused = system_.status(files_[file].descriptor, now);
  if (refused < 0) errno = -refused;
  bytes = static_cast<std::uint64_t>(now.st_size);
  return refused == 0;
}

bool FileSet::unchanged(std::uint32_t file, ReadResult& result) const noexcept {
  struct stat now {};
  const int refused = system_.status(files_[file].descriptor, now);
  if (refused == 0 && FileIdentity::of(now) == files_[file].opened) return true;
  result.status = ReadStatus::kFailed;
  result.offset = -1;
  result.error_number = -refused;
  try {
    result.file = files_[file].path;
    result.problem = refused == 0 ? "the file was changed while it was in use"
                                  : "whether the file was changed cannot be seen";
  } catch (...) {  // NOLINT(bugprone-empty-catch): no memory for the words
  }
  return false;
}

ReadResult FileSet::truncated(const Extent& extent) const {
  struct stat now {};
  const int refused = system_.status(files_[extent.file].descriptor, now);
  ReadResult result{ReadStatus::kFailed, files_[extent.file].path,
                    static_cast<std::int64_t>(extent.offset), -refused, ""};
  result.problem = refused != 0
                       ? "its size cannot be read"
                       : "truncated: the file has " + std::to_string(now.st_size) +
                             " bytes, the extent needs bytes " + std::to_string(extent.offset) +
                             " to " + std::to_string(extent.offset + extent.bytes);
  return result;
}

}  // namespace dsfp4::storage
