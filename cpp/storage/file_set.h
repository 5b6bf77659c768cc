// The open files of a reader: each with a descriptor for direct reads, where there is one, and one
// for reads through the page cache.
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "storage/reader.h"
#include "storage/system.h"

namespace dsfp4::storage {

class FileSet {
 public:
  /// Throws IoError for a file that cannot be opened or is not the expected one.
  FileSet(const std::vector<std::filesystem::path>& paths, const ReaderOptions& options,
          System& system);
  ~FileSet();
  FileSet(const FileSet&) = delete;
  FileSet& operator=(const FileSet&) = delete;

  std::size_t size() const noexcept { return files_.size(); }
  const std::string& path(std::uint32_t file) const { return files_[file].path; }
  bool direct(std::uint32_t file) const noexcept {
    return files_[file].direct.load(std::memory_order_relaxed);
  }
  /// The descriptor to read with, directly or through the page cache.
  int descriptor(std::uint32_t file, bool direct) const noexcept {
    return direct ? files_[file].direct_descriptor : files_[file].descriptor;
  }
  /// Devices are numbered from 0 in the order in which they are met, at most kMaxLanes.
  static constexpr std::size_t kMaxLanes = 8;
  std::size_t lanes() const noexcept { return lanes_; }
  std::size_t lane(std::uint32_t file) const noexcept { return files_[file].lane; }

  /// A direct read was refused as such: from now on the file is read through the page cache.
  void refuse_direct(std::uint32_t file) noexcept;

  /// The file's size; false, with errno set, if the system does not say.
  bool size_now(std::uint32_t file, std::uint64_t& bytes) const noexcept;
  /// Fills the error's fields and returns false if the file is not what it was when it was opened.
  bool unchanged(std::uint32_t file, ReadResult& result) const noexcept;
  /// The error for `extent`, before whose end the file ends.
  ReadResult truncated(const Extent& extent) const;

 private:
  struct File {
    std::string path;
    int descriptor = -1;
    int direct_descriptor = -1;
    std::atomic<bool> direct = false;
    std::size_t lane = 0;
    FileIdentity opened;
  };

  void open(File& file, bool direct);
  void close_all() noexcept;
  void say_not_direct(const std::string& path) noexcept;

  System& system_;
  std::function<void(std::string_view)> log_;
  std::vector<File> files_;
  std::size_t lanes_ = 1;
  std::atomic<bool> said_not_direct_ = false;
};

}  // namespace dsfp4::storage
