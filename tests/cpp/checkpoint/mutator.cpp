#include "checkpoint/mutator.h"

#include <algorithm>
#include <charconv>

#include "checkpoint/safetensors.h"

namespace dsfp4::testing {
namespace {

using Kind = JsonNode::Kind;

const std::vector<std::string>& hostile_tokens() {
  static const std::vector<std::string> tokens = {"0",
                                                  "-0",
                                                  "1",
                                                  "2",
                                                  "3",
                                                  "-1",
                                                  "64",
                                                  "128",
                                                  "2147483647",
                                                  "2147483648",
                                                  "4294967296",
                                                  "9007199254740992",
                                                  "9007199254740993",
                                                  "4611686018427387904",
                                                  "9223372036854775807",
                                                  "9223372036854775808",
                                                  "18446744073709551615",
                                                  "18446744073709551616",
                                                  "-9223372036854775808",
                                                  "-9223372036854775809",
                                                  "1e308",
                                                  "-1e308",
                                                  "1e999",
                                                  "1e-999",
                                                  "0.5",
                                                  "1.0",
                                                  "16.0",
                                                  "1e1",
                                                  "31.999999999999999",
                                                  "null",
                                                  "true",
                                                  "false",
                                                  "NaN",
                                                  "Infinity",
                                                  "-",
                                                  "01",
                                                  "0x10",
                                                  "1.",
                                                  "",
                                                  "\"\"",
                                                  "\"0\"",
                                                  "\"32\"",
                                                  "\"NVFP4\"",
                                                  "\"yarn\"",
                                                  "\"\\u0000\"",
                                                  "\"\\ud800\"",
                                                  "\"\xc3\x28\"",
                                                  "\"\xed\xa0\x80\"",
                                                  "\"\xf8\x88\"",
                                                  "\"unended",
                                                  "\"tab\there\"",
                                                  "[]",
                                                  "{}",
                                                  "[0]",
                                                  "[[]]",
                                                  "{\"a\":1}",
                                                  "[1,]",
                                                  "{,}",
                                                  "}",
                                                  "]",
                                                  "[1e999]",
                                                  "\"\\x\"",
                                                  "/**/1"};
  return tokens;
}

const std::vector<std::string>& dtypes() {
  static const std::vector<std::string> names = {
      "BOOL",    "U8",  "I8",      "I16",  "U16", "I32", "U32", "I64", "U64", "F8_E4M3",
      "F8_E5M2", "F16", "F8_E8M0", "BF16", "F32", "F64", "F4",  "",    "u8",  "F128"};
  return names;
}

const std::vector<std::string>& shard_names() {
  static const std::vector<std::string> names = {"model.safetensors",
                                                 "model-00001-of-00002.safetensors",
                                                 "model-00002-of-00002.safetensors",
                                                 "model-00003-of-00002.safetensors",
                                                 "../model.safetensors",
                                                 "/etc/passwd",
                                                 ".safetensors",
                                                 "a\\u0000.safetensors",
                                                 "..",
                                                 ".",
                                                 "",
                                                 "config.json",
                                                 "sub/model.safetensors",
                                                 std::string(300, 'x') + ".safetensors"};
  return names;
}

void collect(JsonNode& node, std::vector<JsonNode*>& nodes) {
  nodes.push_back(&node);
  for (JsonNode::Member& member : node.members) collect(member.value, nodes);
}

// The number of a token; 0 for what is none.
std::int64_t number_of(const std::string& token) {
  std::int64_t number = 0;
  std::from_chars(token.data(), token.data() + token.size(), number);
  return number;
}

// Names of the header's tensors, without quotes.
std::vector<std::string> tensor_names(const TinyShard& shard) {
  std::vector<std::string> names;
  for (const JsonNode::Member& member : shard.header.members) {
    if (member.value.members.size() == 3) {
      names.push_back(member.key.substr(1, member.key.size() - 2));
    }
  }
  return names;
}

std::string nested(std::size_t levels, bool objects) {
  std::string text;
  for (std::size_t i = 0; i < levels; ++i) text += objects ? "{\"a\":" : "[";
  text += "1";
  for (std::size_t i = 0; i < levels; ++i) text += objects ? '}' : ']';
  return text;
}

}  // namespace

void Mutator::write_damaged(const TinyCheckpoint& sound, const std::filesystem::path& folder) {
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    std::filesystem::remove_all(entry.path());
  }
  TinyCheckpoint damaged = sound;
  const std::size_t changes = 1 + below(3);
  std::size_t in_bytes = 0;
  for (std::size_t i = 0; i < changes; ++i) {
    switch (below(8)) {
      case 0:
        ++in_bytes;
        break;
      case 1:
      case 2:
        damage_tensor(damaged.shards[below(damaged.shards.size())]);
        break;
      case 3:
        damage_scale(damaged.shards[below(damaged.shards.size())]);
        break;
      default:
        damage_tree(damaged);
    }
  }
  Files files = damaged.files();
  for (std::size_t i = 0; i < in_bytes; ++i) damage_file(files);
  for (const auto& [name, bytes] : files) write_file(folder / name, bytes);
  if (below(32) == 0) damage_entry(folder / pick(files).first);
}

void Mutator::damage_tree(TinyCheckpoint& checkpoint) {
  std::vector<std::pair<std::string, JsonNode*>> trees = {
      {"config", &checkpoint.config},         {"config", &checkpoint.config},
      {"config", &checkpoint.config},         {"generation", &checkpoint.generation},
      {"hf_quant", &checkpoint.quantization}, {"index", &checkpoint.index}};
  for (TinyShard& shard : checkpoint.shards) trees.emplace_back("header", &shard.header);
  const auto& [name, tree] = pick(trees);
  note(name + ":");
  damage_node(*tree);
}

void Mutator::damage_node(JsonNode& root) {
  std::vector<JsonNode*> nodes;
  collect(root, nodes);
  JsonNode& node = *pick(nodes);
  if (below(16) == 0) {
    const std::vector<std::size_t> levels = {1, 2, 62, 63, 64, 65, 1000, 50000};
    const std::size_t depth = pick(levels);
    note("a value nested " + std::to_string(depth) + " deep");
    node = JsonNode::raw(nested(depth, below(2) == 0));
  } else if (node.kind == Kind::kToken) {
    damage_token(node);
  } else if (node.members.empty() || below(8) == 0) {
    note("a container becomes a token");
    node = JsonNode::raw(hostile_token());
  } else {
    damage_members(node);
  }
}

void Mutator::damage_token(JsonNode& node) {
  const std::string before = node.token;
  const std::int64_t number = number_of(before);
  const auto as_unsigned = static_cast<std::uint64_t>(number);
  const auto wrapped = [](std::uint64_t value) {
    return std::to_string(static_cast<std::int64_t>(value));
  };
  switch (below(6)) {
    case 0:
      node.token = wrapped(as_unsigned + 1);
      break;
    case 1:
      node.token = wrapped(as_unsigned - 1);
      break;
    case 2:
      node.token = wrapped(as_unsigned * (1 + below(5)));
      break;
    default:
      node.token = hostile_token();
  }
  note(before.substr(0, 40) + " -> " + node.token.substr(0, 40));
}

void Mutator::damage_members(JsonNode& node) {
  auto& members = node.members;
  const std::size_t i = below(members.size());
  const std::size_t j = below(members.size());
  const auto at = static_cast<std::ptrdiff_t>(i);
  note(members[i].key.substr(0, 80));
  switch (below(6)) {
    case 0:
      note("removed");
      members.erase(members.begin() + at);
      break;
    case 1: {
      note("there twice");
      JsonNode::Member copy = members[i];
      members.insert(members.begin() + static_cast<std::ptrdiff_t>(j), std::move(copy));
      break;
    }
    case 2:
      note("swapped with " + members[j].key.substr(0, 80));
      std::swap(members[i].value, members[j].value);
      break;
    case 3:
      note("moved");
      std::swap(members[i], members[j]);
      break;
    default:
      members[i].key = node.kind == Kind::kObject ? hostile_key(node) : "";
      note("renamed to " + members[i].key.substr(0, 80));
  }
}

std::string Mutator::hostile_token() {
  if (below(5) == 0) return '"' + pick(shard_names()) + '"';
  if (below(40) == 0) return '"' + std::string((1 << 20) + below(3) - 1, 'a') + '"';
  return pick(hostile_tokens());
}

std::string Mutator::hostile_key(const JsonNode& siblings) {
  const std::vector<std::string> keys = {"\"\"",
                                         "\"__metadata__\"",
                                         "\"weight_map\"",
                                         "\"\\u0000\"",
                                         "\"\xff\"",
                                         "unquoted",
                                         "\"dtype\"",
                                         "\"shape\"",
                                         "\"data_offsets\"",
                                         "\"model.norm.weight\"",
                                         "1",
                                         "",
                                         "\"rope_parameters\"",
                                         "\"attention_factor\"",
                                         "\"mlp_bias\"",
                                         "\"group_size\""};
  return below(2) == 0 ? pick(siblings.members).key : pick(keys);
}

// Changes that keep the JSON sound, so that what is behind it is reached.
void Mutator::damage_tensor(TinyShard& shard) {
  const std::vector<std::string> names = tensor_names(shard);
  if (names.empty()) return;
  const std::string name = pick(names);
  JsonNode& tensor = *shard.header.find(name);
  note("tensor " + name + ":");
  switch (below(5)) {
    case 0:
      if (JsonNode* dtype = tensor.find("dtype")) {
        *dtype = JsonNode::text(pick(dtypes()));
        note("dtype " + dtype->token);
      }
      break;
    case 1:
      if (JsonNode* shape = tensor.find("shape")) damage_shape(*shape);
      break;
    case 2: {
      const std::string other = pick(names);
      note("entry swapped with " + other);
      std::swap(tensor, *shard.header.find(other));
      break;
    }
    case 3:
      note("removed with its bytes kept");
      shard.header.remove(name);
      break;
    default:
      if (JsonNode* offsets = tensor.find("data_offsets")) damage_offsets(*offsets);
  }
}

void Mutator::damage_shape(JsonNode& shape) {
  auto& dimensions = shape.members;
  switch (below(4)) {
    case 0:
      dimensions.push_back({"", JsonNode::number(1)});  // the same bytes
      break;
    case 1:
      std::reverse(dimensions.begin(), dimensions.end());
      break;
    case 2:  // a product that overflows, to 0 perhaps
      for (std::size_t i = 0; i <= below(4); ++i) {
        dimensions.push_back({"", JsonNode::number(std::int64_t{1} << (16 * (1 + below(3))))});
      }
      break;
    default:
      dimensions.resize(below(2) == 0 ? 0 : 33, {"", JsonNode::number(1)});
  }
  note("shape " + shape.write());
}

void Mutator::damage_offsets(JsonNode& offsets) {
  if (offsets.members.size() != 2) return;
  std::string& begin = offsets.members[0].value.token;
  std::string& end = offsets.members[1].value.token;
  const std::vector<std::int64_t> steps = {-1, 1, -8, 8, 1 << 20, -(1 << 20)};
  const std::int64_t step = pick(steps);
  switch (below(4)) {
    case 0:
      std::swap(begin, end);
      break;
    case 1:  // off by some
      begin = std::to_string(number_of(begin) + step);
      break;
    case 2:
      end = std::to_string(number_of(end) + step);
      break;
    default:  // elsewhere: an overlap and a hole
      begin = std::to_string(number_of(begin) + step);
      end = std::to_string(number_of(end) + step);
  }
  note("offsets " + offsets.write());
}

// Bits of a tensor's data; whole F32 values for NaN, infinity and negative scales.
void Mutator::damage_scale(TinyShard& shard) {
  std::vector<std::string> scales;
  for (const std::string& name : tensor_names(shard)) {
    if (name.find("scale") != std::string::npos) scales.push_back(name);
  }
  if (scales.empty()) return;
  const std::string name = pick(scales);
  JsonNode* offsets = shard.header.find(name)->find("data_offsets");
  if (offsets == nullptr || offsets->members.size() != 2) return;
  const auto begin = static_cast<std::size_t>(number_of(offsets->members[0].value.token));
  const auto end = static_cast<std::size_t>(number_of(offsets->members[1].value.token));
  if (begin >= end || end > shard.data.size()) return;
  if (end - begin == 4 && below(2) == 0) {
    const std::vector<std::string> values = {
        std::string("\x00\x00\xc0\x7f", 4), std::string("\x00\x00\x80\x7f", 4),
        std::string("\x00\x00\x80\xbf", 4), std::string("\x00\x00\x00\x00", 4),
        std::string("\x01\x00\x00\x00", 4), std::string("\xff\xff\x7f\x7f", 4)};
    shard.data.replace(begin, 4, pick(values));
  } else {
    char& byte = shard.data[begin + below(end - begin)];
    byte = static_cast<char>(byte ^ (1 << below(8)));
  }
  note("bytes of " + name);
}

void Mutator::damage_file(Files& files) {
  auto& [name, bytes] = files[below(files.size())];
  note("file " + name + ":");
  const std::size_t at = bytes.empty() ? 0 : below(bytes.size());
  switch (below(6)) {
    case 0:
      note("cut at " + std::to_string(at));
      bytes.resize(at);
      break;
    case 1: {
      const std::size_t added = 1 + below(64);
      note("with " + std::to_string(added) + " bytes more");
      bytes.append(added, static_cast<char>(below(256)));
      break;
    }
    case 2:
      note("without byte " + std::to_string(at));
      if (!bytes.empty()) bytes.erase(at, 1);
      break;
    case 3:
      if (name.ends_with(".safetensors")) {
        damage_length(bytes);
        break;
      }
      [[fallthrough]];
    default:
      note("a bit of byte " + std::to_string(at));
      if (!bytes.empty()) bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(8)));
  }
}

void Mutator::damage_length(std::string& bytes) {
  std::uint64_t length = 0;
  for (std::size_t i = 8; i-- > 0 && bytes.size() >= 8;) {
    length = length << 8 | static_cast<unsigned char>(bytes[i]);
  }
  const std::vector<std::uint64_t> lengths = {0,
                                              1,
                                              2,
                                              7,
                                              8,
                                              length - 1,
                                              length + 1,
                                              length + 8,
                                              bytes.size(),
                                              bytes.size() - 8,
                                              bytes.size() - 7,
                                              checkpoint::kMaxHeaderBytes,
                                              checkpoint::kMaxHeaderBytes + 1,
                                              std::uint64_t{1} << 32,
                                              std::uint64_t{1} << 63,
                                              ~std::uint64_t{0},
                                              ~std::uint64_t{0} - 7};
  length = pick(lengths);
  note("header length " + std::to_string(length));
  for (std::size_t i = 0; i < 8 && i < bytes.size(); ++i) {
    bytes[i] = static_cast<char>(length >> (8 * i));
  }
}

// What lies in a folder need not be a file.
void Mutator::damage_entry(const std::filesystem::path& path) {
  std::filesystem::remove(path);
  switch (below(4)) {
    case 0:
      note(path.filename().string() + " is gone");
      break;
    case 1:
      note(path.filename().string() + " is a folder");
      std::filesystem::create_directory(path);
      break;
    case 2:
      note(path.filename().string() + " is a link to itself");
      std::filesystem::create_symlink(path.filename(), path);
      break;
    default:
      note(path.filename().string() + " is a link to nowhere");
      std::filesystem::create_symlink("nowhere", path);
  }
}

}  // namespace dsfp4::testing
