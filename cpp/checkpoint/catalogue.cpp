#include "checkpoint/catalogue.h"

#include <algorithm>
#include <cerrno>
#include <numeric>
#include <optional>
#include <system_error>
#include <utility>

#include "checkpoint/file.h"
#include "checkpoint/safetensors.h"
#include "checkpoint/shard_index.h"
#include "dsfp4/error.h"

namespace dsfp4::checkpoint {
namespace {

// Names of the *.safetensors files that lie in the folder, hidden ones left out.
std::vector<std::string> list_shards(const std::filesystem::path& folder) {
  std::error_code error;
  std::filesystem::directory_iterator entry(folder, error);
  std::vector<std::string> names;
  for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    if (name.front() != '.' && entry->path().extension() == ".safetensors") names.push_back(name);
  }
  if (error) {
    throw IoError(folder.string(), -1, error.value(), "the checkpoint folder cannot be read");
  }
  return names;
}

}  // namespace

Catalogue Catalogue::open(const std::filesystem::path& folder) {
  Catalogue catalogue;
  std::error_code error;
  catalogue.folder_ = std::filesystem::absolute(folder, error);
  if (error) throw IoError(folder.string(), -1, error.value(), "is not a folder that can be read");
  std::vector<std::string> shards = list_shards(catalogue.folder_);
  std::optional<ShardIndex> index = read_shard_index(catalogue.folder_);
  std::vector<std::string> indexed;
  if (index) indexed = index->shards;
  std::sort(indexed.begin(), indexed.end());
  shards.insert(shards.end(), indexed.begin(), indexed.end());
  std::sort(shards.begin(), shards.end());
  shards.erase(std::unique(shards.begin(), shards.end()), shards.end());

  catalogue.read_headers(shards, indexed);
  catalogue.sort_names();
  if (index) catalogue.check_index(*index);
  return catalogue;
}

void Catalogue::read_headers(const std::vector<std::string>& shards,
                             const std::vector<std::string>& indexed) {
  for (const std::string& shard : shards) {
    const std::filesystem::path path = folder_ / shard;
    const std::optional<InputFile> file = InputFile::open_if_exists(path);
    if (file) {
      read_safetensors_header(*file, static_cast<std::uint32_t>(files_.size()), tensors_);
      files_.push_back(path);
      identities_.push_back(file->identity());
    } else if (std::binary_search(indexed.begin(), indexed.end(), shard)) {
      absent_shards_.push_back(shard);
    } else {  // listed and gone: a link that leads nowhere
      throw IoError(path.string(), -1, ENOENT, "cannot be opened");
    }
  }
  if (files_.empty()) {
    throw CheckpointError(folder_.string(), "", -1,
                          absent_shards_.empty()
                              ? "there is no *.safetensors file in this folder"
                              : "none of the " + std::to_string(absent_shards_.size()) +
                                    " shards that the index names is there, '" +
                                    absent_shards_.front() + "' for one");
  }
}

void Catalogue::sort_names() {
  by_name_.resize(tensors_.size());
  std::iota(by_name_.begin(), by_name_.end(), 0u);
  std::sort(by_name_.begin(), by_name_.end(), [&](std::uint32_t a, std::uint32_t b) {
    const int names = tensors_[a].name.compare(tensors_[b].name);
    return names != 0 ? names < 0 : a < b;
  });
  const auto twice = std::adjacent_find(
      by_name_.begin(), by_name_.end(),
      [&](std::uint32_t a, std::uint32_t b) { return tensors_[a].name == tensors_[b].name; });
  if (twice == by_name_.end()) return;
  const TensorInfo& first = tensors_[*twice];
  throw CheckpointError(file_name(tensors_[*std::next(twice)]), first.name, -1,
                        "this tensor is in '" + file_name(first) + "' as well");
}

// The headers are the truth, so what the index leaves out is welcome; what it says must be so.
void Catalogue::check_index(ShardIndex& index) {
  if (!absent_shards_.empty()) absent_.reserve(index.entries.size());
  for (ShardIndex::Entry& entry : index.entries) {
    const std::string& shard = index.shards[entry.shard];
    const auto absent = std::lower_bound(absent_shards_.begin(), absent_shards_.end(), shard);
    const TensorInfo* tensor = find(entry.tensor);
    if (absent != absent_shards_.end() && *absent == shard) {
      if (tensor == nullptr) {
        absent_.push_back(
            {std::move(entry.tensor), static_cast<std::uint32_t>(absent - absent_shards_.begin())});
      }
    } else if (tensor == nullptr) {
      throw CheckpointError((folder_ / shard).string(), entry.tensor, -1,
                            "the index places this tensor here, but the file does not have it");
    } else if (files_[tensor->file].filename() != shard) {
      throw CheckpointError(index.file, entry.tensor, entry.at,
                            "the index places this tensor in '" + shard + "', but it lies in '" +
                                files_[tensor->file].filename().string() + "'");
    }
  }
}

const TensorInfo* Catalogue::find(std::string_view name) const {
  const auto found = std::lower_bound(
      by_name_.begin(), by_name_.end(), name,
      [&](std::uint32_t i, std::string_view wanted) { return tensors_[i].name < wanted; });
  return found != by_name_.end() && tensors_[*found].name == name ? &tensors_[*found] : nullptr;
}

const Catalogue::AbsentTensor* Catalogue::find_absent(std::string_view name) const {
  const auto found = std::lower_bound(
      absent_.begin(), absent_.end(), name,
      [](const AbsentTensor& tensor, std::string_view wanted) { return tensor.name < wanted; });
  return found != absent_.end() && found->name == name ? &*found : nullptr;
}

const TensorInfo& Catalogue::require(std::string_view name) const {
  if (const TensorInfo* tensor = find(name)) return *tensor;
  if (const AbsentTensor* absent = find_absent(name)) {
    throw CheckpointError((folder_ / absent_shards_[absent->shard]).string(), absent->name, -1,
                          "this shard holds the tensor and is not there; download it");
  }
  std::string problem = "this tensor is missing from the checkpoint";
  if (!absent_shards_.empty()) {
    problem += "; " + std::to_string(absent_shards_.size()) + " of its shards are not there, '" +
               absent_shards_.front() + "' for one";
  }
  throw CheckpointError(folder_.string(), std::string(name), -1, problem);
}

std::string Catalogue::file_name(const TensorInfo& tensor) const {
  return files_.at(tensor.file).string();
}

}  // namespace dsfp4::checkpoint
