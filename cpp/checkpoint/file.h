// Files of a checkpoint folder, read with pread(2): headers and small JSON files only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "base/files.h"

namespace dsfp4::checkpoint {

/// An open regular file. Symbolic links are followed.
class InputFile {
 public:
  /// Empty if there is no such file. Throws IoError where the system refuses, CheckpointError for
  /// what is not a regular file (a pipe is never waited for).
  static std::optional<InputFile> open_if_exists(const std::filesystem::path& path);

  ~InputFile();
  InputFile(InputFile&& other) noexcept;
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;
  InputFile& operator=(InputFile&&) = delete;

  const std::string& name() const noexcept { return name_; }
  /// As it was when it was opened.
  const FileIdentity& identity() const noexcept { return identity_; }
  /// In bytes, when it was opened.
  std::uint64_t size() const noexcept { return identity_.bytes; }
  /// Bytes [offset, offset + bytes). Throws IoError, and CheckpointError if the file ends before.
  std::string read(std::uint64_t offset, std::size_t bytes) const;

 private:
  InputFile(std::string name, int descriptor);

  std::string name_;
  int descriptor_;
  FileIdentity identity_;
};

/// All of a file; empty if there is none. Throws CheckpointError if it is larger than `max_bytes`
/// or is a Git LFS pointer, IoError if it is a link that leads nowhere.
std::optional<std::string> read_file_if_exists(const std::filesystem::path& path,
                                               std::uint64_t max_bytes);

}  // namespace dsfp4::checkpoint
