// The checksum sidecar: dsfp4.xxh3.json in the checkpoint folder holds one XXH3 hash for the bytes
// of each tensor. {"algorithm": "xxh3-64", "tensors": {"model.norm.weight": "0123456789abcdef",
// ...}}
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/catalogue.h"

namespace dsfp4::checkpoint {

inline constexpr std::string_view kHashFile = "dsfp4.xxh3.json";
/// What a sidecar may hold at most, as an index may: that of DeepSeek-R1 in NVFP4 has 187,000
/// tensors and 15 MB.
inline constexpr std::uint64_t kMaxHashFileBytes = 50'000'000;
inline constexpr std::size_t kMaxHashes = 640'000;

/// XXH3 with 64 bits and seed 0 of bytes that come in pieces. Source: xxHash's specification.
class Xxh3 {
 public:
  Xxh3();
  ~Xxh3();
  Xxh3(const Xxh3&) = delete;
  Xxh3& operator=(const Xxh3&) = delete;

  void update(std::span<const std::byte> bytes);
  std::uint64_t digest() const;

  /// Of bytes that are all there.
  static std::uint64_t of(std::span<const std::byte> bytes);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

struct TensorHash {
  std::string tensor;
  std::uint64_t hash = 0;
};

class TensorHashes {
 public:
  /// Empty if the folder has no sidecar. Throws CheckpointError, with the byte, for one that is
  /// malformed or over the limits above.
  static std::optional<TensorHashes> read(const std::filesystem::path& folder);

  std::size_t size() const noexcept { return entries_.size(); }
  std::optional<std::uint64_t> find(std::string_view tensor) const;
  /// Throws CheckpointError, naming file and tensor, unless `bytes`, all of the tensor's, have the
  /// hash that the sidecar gives.
  void check(const Catalogue& catalogue, const TensorInfo& tensor,
             std::span<const std::byte> bytes) const;
  /// What is wrong with a tensor whose bytes have that hash; empty if nothing is.
  std::optional<std::string> problem(std::string_view tensor, std::uint64_t hash) const;

 private:
  friend class HashFileHandler;
  struct Entry {
    std::uint32_t name_begin = 0;  // bytes of names_
    std::uint32_t name_bytes = 0;
    std::uint64_t hash = 0;
  };

  std::string_view name(const Entry& entry) const {
    return std::string_view(names_).substr(entry.name_begin, entry.name_bytes);
  }

  std::string names_;           // of all tensors: a million small strings are slow to free
  std::vector<Entry> entries_;  // sorted by name
};

/// Writes the sidecar, whole or not at all. Throws IoError.
void write_tensor_hashes(const std::filesystem::path& folder, std::vector<TensorHash> hashes);

}  // namespace dsfp4::checkpoint
