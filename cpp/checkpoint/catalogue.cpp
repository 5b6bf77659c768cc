#include "checkpoint/catalogue.h"

#include <algorithm>
#include <cerrno>
#include <iterator>
#include <optional>
#include <system_error>
#include <tuple>
#include <utility>

#include "base/log.h"
#include "checkpoint/absence.h"
#include "checkpoint/file.h"
#include "checkpoint/safetensors.h"
#include "checkpoint/shard_index.h"
#include "dsfp4/error.h"

namespace dsfp4::checkpoint {
namespace {

// Of a described shard: no multiple of a page, as headers are none.
constexpr std::uint64_t kDescribedHeaderBytes = 1000;

constexpr const char* kWholeModel = "model.safetensors";

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

// Both are sorted; `decided` is the file that says which shards are the model's.
void log_unread(const std::vector<std::string>& listed, const std::vector<std::string>& shards,
                const std::string& decided) {
  std::vector<std::string> others;
  std::ranges::set_difference(listed, shards, std::back_inserter(others));
  if (others.empty()) return;
  log(LogLevel::kInfo,
      "'" + others.front() + "'" +
          (others.size() == 1 ? " is" : " and " + std::to_string(others.size() - 1) + " more are") +
          " not read: '" + decided + "' decides which files the model is");
}

}  // namespace

Catalogue Catalogue::open(const std::filesystem::path& folder) {
  Catalogue catalogue;
  std::error_code error;
  catalogue.folder_ = std::filesystem::absolute(folder, error);
  if (error) throw IoError(folder.string(), -1, error.value(), "is not a folder that can be read");
  std::vector<std::string> shards = list_shards(catalogue.folder_);
  std::ranges::sort(shards);
  const auto is_there = [&](const std::string& shard) {
    return std::ranges::binary_search(shards, shard);
  };
  const std::vector<std::string> listed = shards;
  const bool whole = is_there(kWholeModel);
  std::optional<ShardIndex> index = read_shard_index(catalogue.folder_);
  if (index && whole && std::ranges::none_of(index->shards, is_there)) index.reset();
  if (index) {
    shards = index->shards;
    std::ranges::sort(shards);
  } else if (whole) {
    shards = {kWholeModel};
  }
  log_unread(listed, shards, index ? index->file : (catalogue.folder_ / kWholeModel).string());
  catalogue.read_headers(shards, index.has_value());
  if (index) catalogue.check_index(*index);
  return catalogue;
}

Catalogue Catalogue::described(std::string_view name, std::vector<std::vector<TensorInfo>> shards) {
  Catalogue catalogue;
  catalogue.folder_ = name;
  std::vector<std::ptrdiff_t> runs;
  for (std::vector<TensorInfo>& shard : shards) {
    // Wide values first, as safetensors aligns them so.
    std::ranges::sort(shard, {}, [](const TensorInfo& tensor) {
      return std::tuple(-static_cast<int>(format::dtype_size(tensor.dtype)), tensor.dtype,
                        std::string_view(tensor.name));
    });
    std::uint64_t offset = kDescribedHeaderBytes;
    runs.push_back(static_cast<std::ptrdiff_t>(catalogue.by_name_.size()));
    for (TensorInfo& tensor : shard) {
      tensor.file = static_cast<std::uint32_t>(catalogue.files_.size());
      tensor.offset = offset;
      tensor.bytes = format::dtype_size(tensor.dtype);
      for (const std::int64_t extent : tensor.shape) {
        tensor.bytes *= static_cast<std::uint64_t>(extent);
      }
      offset += tensor.bytes;
      catalogue.by_name_.push_back(static_cast<std::uint32_t>(catalogue.tensors_.size()));
      catalogue.tensors_.push_back(std::move(tensor));
    }
    std::ranges::sort(
        catalogue.by_name_.begin() + runs.back(), catalogue.by_name_.end(), {},
        [&](std::uint32_t index) -> std::string_view { return catalogue.tensors_[index].name; });
    catalogue.files_.push_back(catalogue.folder_ /
                               ("shard-" + std::to_string(catalogue.files_.size())));
  }
  catalogue.merge_names(std::move(runs));
  return catalogue;
}

void Catalogue::read_headers(const std::vector<std::string>& shards, bool indexed) {
  std::vector<std::ptrdiff_t> runs;  // where in by_name_ each file's names begin
  for (const std::string& shard : shards) {
    const std::filesystem::path path = folder_ / shard;
    const std::optional<InputFile> file = InputFile::open_if_exists(path);
    if (file) {
      runs.push_back(static_cast<std::ptrdiff_t>(by_name_.size()));
      read_safetensors_header(*file, static_cast<std::uint32_t>(files_.size()), tensors_, by_name_);
      files_.push_back(path);
      identities_.push_back(file->identity());
    } else if (indexed) {
      absent_shards_.push_back(shard);
    } else {  // listed and gone
      const std::string why = describe_absence(path);
      throw IoError(path.string(), -1, ENOENT, why.empty() ? "cannot be opened" : why);
    }
  }
  if (files_.empty()) {
    throw CheckpointError(
        folder_.string(), "", -1,
        absent_shards_.empty()
            ? "there is no *.safetensors file in this folder" + describe_unfinished(folder_)
            : "none of the " + std::to_string(absent_shards_.size()) +
                  " shards that the index names is there, '" + absent_shards_.front() +
                  "' for one" + describe_unfinished(folder_));
  }
  merge_names(std::move(runs));
}

// The names of each file are in order: neighbours are merged until one run is left.
void Catalogue::merge_names(std::vector<std::ptrdiff_t> runs) {
  const auto by_name = [&](std::uint32_t a, std::uint32_t b) {
    return tensors_[a].name < tensors_[b].name;
  };
  const auto begin = by_name_.begin();
  runs.push_back(static_cast<std::ptrdiff_t>(by_name_.size()));
  while (runs.size() > 2) {
    std::vector<std::ptrdiff_t> merged;
    for (std::size_t i = 0; i + 1 < runs.size(); i += 2) {
      merged.push_back(runs[i]);
      if (i + 2 == runs.size()) break;
      std::inplace_merge(begin + runs[i], begin + runs[i + 1], begin + runs[i + 2], by_name);
    }
    merged.push_back(runs.back());
    runs = std::move(merged);
  }
  const auto twice = std::adjacent_find(
      by_name_.begin(), by_name_.end(),
      [&](std::uint32_t a, std::uint32_t b) { return tensors_[a].name == tensors_[b].name; });
  if (twice == by_name_.end()) return;
  const TensorInfo& first = tensors_[*twice];
  throw CheckpointError(file_name(tensors_[*std::next(twice)]), first.name, -1,
                        "this tensor is in '" + file_name(first) + "' as well");
}

// The headers are the truth: the index may leave tensors out, or place them elsewhere. Its other
// entries are kept for require().
void Catalogue::check_index(ShardIndex& index) {
  struct Place {
    std::optional<std::uint32_t> absent;  // index into absent_shards_
    std::uint32_t file = 0;               // else index into files_
  };
  std::vector<Place> places;  // of the index's shards
  for (const std::string& shard : index.shards) {
    const auto absent = std::lower_bound(absent_shards_.begin(), absent_shards_.end(), shard);
    if (absent != absent_shards_.end() && *absent == shard) {
      places.push_back({static_cast<std::uint32_t>(absent - absent_shards_.begin())});
    } else {
      const auto file = std::lower_bound(files_.begin(), files_.end(), folder_ / shard);
      places.push_back({std::nullopt, static_cast<std::uint32_t>(file - files_.begin())});
    }
  }
  if (!absent_shards_.empty()) absent_.reserve(index.entries.size());
  auto here = by_name_.begin();
  for (const ShardIndex::Entry& entry : index.entries) {  // both are in the order of the names
    const std::string_view name = index.name(entry);
    while (here != by_name_.end() && tensors_[*here].name < name) ++here;
    if (here != by_name_.end() && tensors_[*here].name == name) continue;
    const Place& place = places[entry.shard];
    auto& missing = place.absent ? absent_ : stale_;
    missing.push_back({entry.name_begin, entry.name_bytes, place.absent.value_or(place.file)});
  }
  if (!absent_.empty() || !stale_.empty()) absent_names_ = std::move(index.names);
}

const TensorInfo* Catalogue::find(std::string_view name) const {
  const auto found = std::lower_bound(
      by_name_.begin(), by_name_.end(), name,
      [&](std::uint32_t i, std::string_view wanted) { return tensors_[i].name < wanted; });
  return found != by_name_.end() && tensors_[*found].name == name ? &tensors_[*found] : nullptr;
}

std::string_view Catalogue::name_of(const AbsentTensor& tensor) const {
  return std::string_view(absent_names_).substr(tensor.name_begin, tensor.name_bytes);
}

const Catalogue::AbsentTensor* Catalogue::find(const std::vector<AbsentTensor>& tensors,
                                               std::string_view name) const {
  const auto found = std::lower_bound(tensors.begin(), tensors.end(), name,
                                      [&](const AbsentTensor& tensor, std::string_view wanted) {
                                        return name_of(tensor) < wanted;
                                      });
  return found != tensors.end() && name_of(*found) == name ? &*found : nullptr;
}

const TensorInfo& Catalogue::require(std::string_view name) const {
  if (const TensorInfo* tensor = find(name)) return *tensor;
  if (const AbsentTensor* absent = find(absent_, name)) {
    const std::filesystem::path shard = folder_ / absent_shards_[absent->shard];
    const std::string why = describe_absence(shard);
    throw CheckpointError(
        shard.string(), std::string(name), -1,
        "this shard holds the tensor and " + (why.empty() ? "is not there; download it" : why));
  }
  if (const AbsentTensor* stale = find(stale_, name)) {
    throw CheckpointError(files_[stale->shard].string(), std::string(name), -1,
                          "the index places this tensor here, but the file does not have it");
  }
  std::string problem = "this tensor is missing from the checkpoint";
  if (!absent_shards_.empty()) {
    problem += "; " + std::to_string(absent_shards_.size()) + " of its shards are not there, '" +
               absent_shards_.front() + "' for one";
  }
  throw CheckpointError(folder_.string(), std::string(name), -1, problem);
}

std::vector<std::string_view> Catalogue::absent_tensors() const {
  std::vector<std::string_view> names;
  names.reserve(absent_.size());
  for (const AbsentTensor& tensor : absent_) names.push_back(name_of(tensor));
  return names;
}

std::string Catalogue::file_name(const TensorInfo& tensor) const {
  return files_.at(tensor.file).string();
}

void Catalogue::fail(const TensorInfo& tensor, const std::string& problem) const {
  throw CheckpointError(file_name(tensor), tensor.name, static_cast<std::int64_t>(tensor.offset),
                        problem);
}

void Catalogue::unsupported(const TensorInfo& tensor, const std::string& problem) const {
  throw UnsupportedError(file_name(tensor) + ": '" + tensor.name + "' at byte " +
                         std::to_string(tensor.offset) + ": " + problem);
}

}  // namespace dsfp4::checkpoint
