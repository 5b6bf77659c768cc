#include "checkpoint/shard_index.h"

#include <algorithm>
#include <functional>
#include <map>
#include <set>
#include <string_view>
#include <utility>

#include "checkpoint/file.h"
#include "checkpoint/json.h"
#include "checkpoint/name_order.h"
#include "dsfp4/error.h"

namespace dsfp4::checkpoint {
namespace {

constexpr std::size_t kMaxRootKeys = 256;
constexpr std::size_t kMinEntryBytes = 18;  // the text "":".safetensors",
constexpr std::size_t kMaxFileName = 255;
constexpr std::string_view kExtension = ".safetensors";

// Keeps weight_map's pairs; everything else in the index is only checked for being sound.
class IndexHandler : public JsonHandler {
 public:
  explicit IndexHandler(ShardIndex& index) : index_(index), other_(index.file) {}

  void begin_document(const JsonOutline& outline) override {
    const std::size_t possible = outline.bytes / kMinEntryBytes + 1;
    index_.entries.reserve(std::min({outline.strings / 2, possible, kMaxIndexTensors}));
    index_.names.reserve(outline.bytes);  // they are parts of the text, and escapes are longer
  }

  void begin_object(std::size_t at) override {
    if (depth_ == 1) in_weight_map_ = root_key_ == "weight_map";
    if (depth_ > 1 || (depth_ == 1 && !in_weight_map_)) {
      if (in_weight_map_) refuse(at);
      other_.begin_object(at);
    }
    ++depth_;
  }

  void key(std::string_view name, std::size_t at) override {
    if (depth_ == 1) {
      root_key_ = name;
      if (!root_keys_.insert(root_key_).second) fail(root_key_, at, "this key is there twice");
      if (root_keys_.size() > kMaxRootKeys) {
        fail(root_key_, at,
             "the index has too many keys; the limit is " + std::to_string(kMaxRootKeys));
      }
      weight_map_seen_ = weight_map_seen_ || name == "weight_map";
    } else if (in_weight_map_) {
      if (index_.entries.size() == kMaxIndexTensors) {
        fail(std::string(name), at,
             "the index names more than " + std::to_string(kMaxIndexTensors) + " tensors");
      }
      index_.entries.push_back({static_cast<std::uint32_t>(index_.names.size()),
                                static_cast<std::uint32_t>(name.size()), 0,
                                static_cast<std::uint32_t>(at)});
      index_.names += name;
    } else {
      other_.key(name, at);
    }
  }

  void end_object(std::size_t at) override {
    --depth_;
    if (depth_ >= 1 && !in_weight_map_) other_.end_object(at);
    leave();
  }

  void begin_array(std::size_t at) override {
    if (in_weight_map_ || (depth_ == 1 && root_key_ == "weight_map")) refuse(at);
    other_.begin_array(at);
    ++depth_;
  }

  void end_array(std::size_t at) override {
    --depth_;
    other_.end_array(at);
    leave();
  }

  void scalar(const JsonScalar& value, std::size_t at) override {
    if (!in_weight_map_ && root_key_ == "weight_map") refuse(at);
    if (!in_weight_map_) {
      other_.scalar(value, at);
      leave();
      return;
    }
    const auto* shard = std::get_if<std::string_view>(&value);
    if (shard == nullptr) refuse(at);
    index_.entries.back().shard = shard_number(*shard, at);
  }

  bool weight_map_seen() const { return weight_map_seen_; }

 private:
  [[noreturn]] void fail(const std::string& key, std::size_t at, const std::string& problem) const {
    throw CheckpointError(index_.file, key, static_cast<std::int64_t>(at), problem);
  }

  [[noreturn]] void refuse(std::size_t at) const {
    fail(index_.entries.empty() || !in_weight_map_ ? "weight_map" : last_tensor(), at,
         "weight_map must be an object of tensor names and shard file names");
  }

  std::string last_tensor() const { return std::string(index_.name(index_.entries.back())); }

  // After a value at the root's level, of which nothing is kept.
  void leave() {
    if (depth_ != 1) return;
    in_weight_map_ = false;
    other_.take();
  }

  std::uint32_t shard_number(std::string_view shard, std::size_t at) {
    if (const auto known = numbers_.find(shard); known != numbers_.end()) return known->second;
    const std::string tensor = last_tensor();
    if (shard.size() > kMaxFileName || shard.find('/') != std::string::npos ||
        shard.find('\0') != std::string::npos || !shard.ends_with(kExtension)) {
      fail(tensor, at,
           "its shard must be the bare name of a *.safetensors file in the same folder, not " +
               describe(JsonValue{std::string(shard), at}));
    }
    if (index_.shards.size() == kMaxShards) {
      fail(tensor, at, "the index names more than " + std::to_string(kMaxShards) + " shards");
    }
    const auto number = static_cast<std::uint32_t>(index_.shards.size());
    index_.shards.emplace_back(shard);
    numbers_.emplace(shard, number);
    return number;
  }

  ShardIndex& index_;
  JsonTreeBuilder other_;
  std::map<std::string, std::uint32_t, std::less<>> numbers_;
  std::size_t depth_ = 0;
  bool in_weight_map_ = false;
  bool weight_map_seen_ = false;
  std::string root_key_;
  std::set<std::string> root_keys_;
};

}  // namespace

std::optional<ShardIndex> read_shard_index(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "model.safetensors.index.json";
  ShardIndex index;
  index.file = path.string();
  {
    const std::optional<std::string> text = read_file_if_exists(path, kMaxIndexBytes);
    if (!text) return std::nullopt;
    IndexHandler handler(index);
    parse_json(*text, index.file, 0, handler);
    if (!handler.weight_map_seen()) {
      throw CheckpointError(index.file, "weight_map", -1, "is missing");
    }
  }
  NameOrder names = order_names(index.entries.size(),
                                [&](std::size_t i) { return index.name(index.entries[i]); });
  if (names.twice) {
    const ShardIndex::Entry& second = index.entries[names.order[*names.twice + 1]];
    throw CheckpointError(index.file, std::string(index.name(second)), second.at,
                          "this tensor is there twice");
  }
  apply_order(std::move(names.order), index.entries);
  return index;
}

}  // namespace dsfp4::checkpoint
