// model.safetensors.index.json: which shard holds which tensor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace dsfp4::checkpoint {

struct ShardIndex {
  struct Entry {
    std::string tensor;
    std::uint32_t shard = 0;  // index into `shards`
    std::uint32_t at = 0;     // byte offset of the tensor's name in the index
  };

  std::string file;                 // the index itself
  std::vector<std::string> shards;  // bare file names, in the order of their first use
  std::vector<Entry> entries;       // sorted by tensor, no two the same
};

/// Empty if the folder has no index. Throws CheckpointError for a malformed one: not JSON, over
/// 256 MiB, no weight_map, duplicate keys, over 16384 shards, a shard that is not the bare name of
/// a *.safetensors file in the folder.
std::optional<ShardIndex> read_shard_index(const std::filesystem::path& folder);

}  // namespace dsfp4::checkpoint
