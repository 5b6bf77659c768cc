#include "storage/file_set.h"

#include <algorithm>
#include <cerrno>
#include <fcntl.h>
#include <utility>

#include "dsfp4/error.h"

namespace dsfp4::storage {

FileSet::FileSet(const std::vector<std::filesystem::path>& paths, bool direct, System& system,
                 std::function<void(std::string_view)> log)
    : system_(system), log_(std::move(log)), files_(paths.size()) {
  try {
    std::vector<dev_t> devices;
    for (std::size_t i = 0; i < paths.size(); ++i) {
      files_[i].path = paths[i].string();
      open(files_[i], direct);
      const dev_t device = files_[i].opened.st_dev;
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
  const int refused = system_.status(file.descriptor, file.opened);
  if (refused < 0) throw IoError(file.path, -1, -refused, "its size cannot be read");
  if (!direct) return;
  const int descriptor = system_.open(file.path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_DIRECT);
  if (descriptor == -EINVAL || descriptor == -EOPNOTSUPP) {
    say_not_direct(file.path);
    return;
  }
  if (descriptor < 0) throw IoError(file.path, -1, -descriptor, "cannot be opened");
  file.direct_descriptor = descriptor;
  struct stat second {};
  const int unknown = system_.status(descriptor, second);
  if (unknown < 0) throw IoError(file.path, -1, -unknown, "its size cannot be read");
  if (second.st_ino != file.opened.st_ino || second.st_dev != file.opened.st_dev) {
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
  const struct stat& then = files_[file].opened;
  if (refused == 0 && now.st_size == then.st_size && now.st_mtim.tv_sec == then.st_mtim.tv_sec &&
      now.st_mtim.tv_nsec == then.st_mtim.tv_nsec) {
    return true;
  }
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
