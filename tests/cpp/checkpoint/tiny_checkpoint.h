// Valid checkpoints of a few kilobytes, held as JSON trees and bytes so that tests can damage any
// part of them before it is written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dsfp4::testing {

/// A JSON value as text that is not checked: a token is written as it stands, a key with its
/// quotes, so a tree can also say what no JSON may.
struct JsonNode {
  enum class Kind : std::uint8_t { kToken, kArray, kObject };
  struct Member;

  Kind kind = Kind::kToken;
  std::string token = "null";
  std::vector<Member> members;  // of an array or object

  static JsonNode raw(std::string token);
  static JsonNode text(std::string_view value);  // adds the quotes
  static JsonNode number(std::int64_t value);
  static JsonNode array(const std::vector<std::int64_t>& values);
  static JsonNode object(std::vector<std::pair<std::string, JsonNode>> members);

  JsonNode* find(std::string_view name);
  void set(std::string_view name, JsonNode value);  // replaces or appends
  void remove(std::string_view name);
  std::string write() const;
};

struct JsonNode::Member {
  std::string key;  // with its quotes; empty in an array
  JsonNode value;
};

struct TinyShard {
  std::string name;
  JsonNode header;
  std::string data;

  /// Appends a tensor of zeros; its name has no place in the index.
  void add(const std::string& tensor, std::string_view dtype,
           const std::vector<std::int64_t>& shape);
  /// Gives a tensor that is there another name.
  void rename(std::string_view tensor, const std::string& to);
};

/// A whole checkpoint folder. JSON objects that are tokens with no text are not written.
struct TinyCheckpoint {
  JsonNode config, generation, quantization, index;
  std::vector<TinyShard> shards;

  /// The shard's file: length, header, data.
  static std::string file_of(const TinyShard& shard);
  /// All files, name and bytes.
  std::vector<std::pair<std::string, std::string>> files() const;
  void write(const std::filesystem::path& folder) const;
};

enum class TinyKind : std::uint8_t {
  kNvfp4,       // V3: FP8 attention, NVFP4 experts in ModelOpt's names, two shards and an index
  kCompressed,  // V3: NVFP4 in compressed-tensors' names, FP8 KV scale, one shard, no index
  kBf16,        // V2: BF16, plain q_proj, tied head, one shard and an index
  kMixed,       // as kNvfp4, but from the third layer on every other one's routed experts are FP8
};
/// The kinds whose routed experts are all alike.
inline constexpr TinyKind kTinyKinds[] = {TinyKind::kNvfp4, TinyKind::kCompressed, TinyKind::kBf16};

/// `experts`: routed ones, an even number.
TinyCheckpoint make_tiny_checkpoint(TinyKind kind, std::int64_t layers = 2,
                                    std::int64_t experts = 4);

void write_file(const std::filesystem::path& path, std::string_view bytes);

/// A folder of its own, removed at the end.
class ScratchFolder {
 public:
  ScratchFolder();
  ~ScratchFolder();
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;
  const std::filesystem::path& path() const noexcept { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace dsfp4::testing
