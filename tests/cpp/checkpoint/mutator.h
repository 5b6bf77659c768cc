// Damages a sound checkpoint in one to three places, where it hurts: numbers, names, shapes,
// offsets, types, nesting, and the bytes of the files.
#pragma once

#include <cstdint>
#include <filesystem>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/tiny_checkpoint.h"

namespace dsfp4::testing {

class Mutator {
 public:
  /// The same seed does the same.
  explicit Mutator(std::uint64_t seed) : random_(seed) {}

  /// Writes a damaged copy of `sound` into `folder`, which is emptied first.
  void write_damaged(const TinyCheckpoint& sound, const std::filesystem::path& folder);
  /// What was done, in words.
  const std::string& log() const noexcept { return log_; }

 private:
  using Files = std::vector<std::pair<std::string, std::string>>;

  std::size_t below(std::size_t bound) { return static_cast<std::size_t>(random_() % bound); }
  template <typename T>
  const T& pick(const std::vector<T>& from) {
    return from[below(from.size())];
  }
  void note(const std::string& what) { log_ += (log_.empty() ? "" : "; ") + what; }

  void damage_tree(TinyCheckpoint& checkpoint);
  void damage_node(JsonNode& root);
  void damage_token(JsonNode& node);
  void damage_members(JsonNode& node);
  void damage_tensor(TinyShard& shard);
  void damage_offsets(JsonNode& offsets);
  void damage_shape(JsonNode& shape);
  void damage_scale(TinyShard& shard);
  void damage_file(Files& files);
  void damage_length(std::string& bytes);
  void damage_entry(const std::filesystem::path& path);
  std::string hostile_token();
  std::string hostile_key(const JsonNode& siblings);

  std::mt19937_64 random_;
  std::string log_;
};

}  // namespace dsfp4::testing
