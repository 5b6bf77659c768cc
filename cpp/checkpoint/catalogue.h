// The catalogue: every tensor of a checkpoint folder and where its bytes lie. Reads headers only.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "base/files.h"
#include "format/dtype.h"

namespace dsfp4::checkpoint {

struct ShardIndex;

/// Most characters of a dtype's name.
inline constexpr std::size_t kMaxDtypeName = 15;

struct TensorInfo {
  std::string name;
  format::DType dtype = format::DType::kF32;
  // The header's word for a dtype that is kOther, ended by a 0: such a tensor may lie there, as
  // long as nobody needs it.
  std::array<char, kMaxDtypeName + 1> other_dtype{};
  std::vector<std::int64_t> shape;  // [] is a scalar
  std::uint32_t file = 0;           // index into Catalogue::files()
  std::uint64_t offset = 0;         // absolute byte offset in that file
  std::uint64_t bytes = 0;

  /// As the header spells it, known or not.
  std::string_view dtype_name() const {
    return dtype == format::DType::kOther ? other_dtype.data() : format::dtype_name(dtype);
  }
};

class Catalogue {
 public:
  /// Reads the headers of the shards in `folder`: those that model.safetensors.index.json names,
  /// else model.safetensors, else every *.safetensors file that lies there. Other files are not
  /// looked at where one of the first two decides. The headers say which tensors there are and
  /// where; an entry of the index counts where its shard is not there (a tensor of it that is then
  /// needed is an error later). An index of whose shards none is there yields to model.safetensors.
  /// Throws CheckpointError for anything malformed, IoError where the system refuses.
  static Catalogue open(const std::filesystem::path& folder);

  /// Tensors that lie in no files, by the shard that each would be in: name, dtype and shape are
  /// given, the rest follows as exporters write it, by dtype and then by name. Throws
  /// CheckpointError for a name that is there twice.
  static Catalogue described(std::string_view name, std::vector<std::vector<TensorInfo>> shards);

  // Layouts point into it: it moves, and is never copied.
  Catalogue(Catalogue&&) = default;
  Catalogue& operator=(Catalogue&&) = default;
  Catalogue(const Catalogue&) = delete;
  Catalogue& operator=(const Catalogue&) = delete;

  const std::filesystem::path& folder() const noexcept { return folder_; }
  const std::vector<std::filesystem::path>& files() const noexcept { return files_; }
  /// What each file was when its header was read.
  const std::vector<FileIdentity>& identities() const noexcept { return identities_; }
  const std::vector<TensorInfo>& tensors() const noexcept { return tensors_; }
  /// Null if there is none.
  const TensorInfo* find(std::string_view name) const;
  /// Throws CheckpointError that names the tensor and, if the index places it in a shard that is
  /// not there, or that does not have it, that shard.
  const TensorInfo& require(std::string_view name) const;
  /// Whether the index places that tensor in a shard that is not there.
  bool in_absent_shard(std::string_view name) const { return find(absent_, name) != nullptr; }
  /// Names that the index places in shards that are not there, sorted.
  std::vector<std::string_view> absent_tensors() const;
  std::string file_name(const TensorInfo& tensor) const;

  /// Throws CheckpointError: the file, the tensor, its first byte and the problem.
  [[noreturn]] void fail(const TensorInfo& tensor, const std::string& problem) const;
  /// Throws UnsupportedError with the same facts.
  [[noreturn]] void unsupported(const TensorInfo& tensor, const std::string& problem) const;

 private:
  // A tensor that the index places in a shard that is not there, or that does not have it.
  struct AbsentTensor {
    std::uint32_t name_begin = 0;  // bytes of absent_names_
    std::uint32_t name_bytes = 0;
    std::uint32_t shard = 0;  // index into absent_shards_, or into files_
  };

  Catalogue() = default;
  void read_headers(const std::vector<std::string>& shards, bool indexed);
  void merge_names(std::vector<std::ptrdiff_t> runs);
  std::string_view name_of(const AbsentTensor& tensor) const;
  const AbsentTensor* find(const std::vector<AbsentTensor>& tensors, std::string_view name) const;
  void check_index(ShardIndex& index);  // may take its names

  std::filesystem::path folder_;
  std::vector<std::filesystem::path> files_;
  std::vector<FileIdentity> identities_;
  std::vector<TensorInfo> tensors_;
  // Sorted, not hashed: names are chosen by strangers, and a hash can be made to collide.
  std::vector<std::uint32_t> by_name_;
  std::vector<AbsentTensor> absent_;  // sorted by name, as the next
  std::vector<AbsentTensor> stale_;   // of shards that are there
  std::string absent_names_;
  std::vector<std::string> absent_shards_;
};

}  // namespace dsfp4::checkpoint
