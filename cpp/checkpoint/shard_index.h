// model.safetensors.index.json: which shard holds which tensor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace dsfp4::checkpoint {

/// What an index may hold at most: three times that of DeepSeek-R1 in NVFP4, the largest supported
/// (187,000 tensors, 163 shards, 20 MB), so that reading it takes under a second on an idle core.
inline constexpr std::uint64_t kMaxIndexBytes = 64'000'000;
inline constexpr std::size_t kMaxIndexTensors = 640'000;
inline constexpr std::size_t kMaxShards = 1024;

struct ShardIndex {
  struct Entry {
    std::uint32_t name_begin = 0;  // bytes of `names`
    std::uint32_t name_bytes = 0;
    std::uint32_t shard = 0;  // index into `shards`
    std::uint32_t at = 0;     // byte offset of the tensor's name in the index
  };

  std::string_view name(const Entry& entry) const {
    return std::string_view(names).substr(entry.name_begin, entry.name_bytes);
  }

  std::string file;                 // the index itself
  std::vector<std::string> shards;  // bare file names, in the order of their first use
  std::string names;                // of all tensors: a million small strings are slow to free
  std::vector<Entry> entries;       // sorted by name, no two the same
};

/// Empty if the folder has no index. Throws CheckpointError for a malformed one: not JSON, over one
/// of the limits above, no weight_map, duplicate keys, a shard that is not the bare name of a
/// *.safetensors file in the folder.
std::optional<ShardIndex> read_shard_index(const std::filesystem::path& folder);

}  // namespace dsfp4::checkpoint
