// Malformed checkpoints by hand: every place where a file can end, the limits of the JSON that is
// read, and tensors that are not where they should be. test_malformed_config.cpp has the
// configurations, tests/python/test_checkpoint.py those that are one of a kind.
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <string>
#include <sys/stat.h>
#include <utility>
#include <vector>

#include "checkpoint/malformed.h"
#include "checkpoint/safetensors.h"
#include "checkpoint/shard_index.h"

namespace dsfp4::testing {
namespace {

namespace fs = std::filesystem;

// ---- where files end ----------------------------------------------------------------------------

// All of them in the full tier, every seventh in the quick one.
std::size_t stride() { return std::getenv("DSFP4_FULL") != nullptr ? 1 : 7; }

TEST_F(Malformed, JsonFilesCutAnywhere) {
  sound_.write(folder_.path());
  for (const auto& [name, bytes] : sound_.files()) {
    if (name.ends_with(".safetensors")) continue;
    for (std::size_t length = 0; length < bytes.size(); length += stride()) {
      write_file(folder_.path() / name, std::string_view(bytes).substr(0, length));
      const Refusal refusal = open();
      ASSERT_EQ(refusal.file, name) << "cut at " << length;
      ASSERT_LE(refusal.offset, static_cast<std::int64_t>(length)) << refusal.message;
    }
    write_file(folder_.path() / name, bytes);
  }
}

TEST_F(Malformed, ShardCutAtEveryBoundary) {
  sound_.write(folder_.path());
  const std::string bytes = TinyCheckpoint::file_of(sound_.shards[1]);
  const std::size_t data_begin = bytes.size() - sound_.shards[1].data.size();
  std::vector<std::size_t> lengths;
  for (std::size_t i = 0; i < data_begin; i += stride()) lengths.push_back(i);
  for (const JsonNode::Member& tensor : sound_.shards[1].header.members) {
    if (tensor.value.members.size() != 3) continue;
    const JsonNode& end = tensor.value.members[2].value.members[1].value;
    for (const std::size_t around : {0, 1, 2}) {
      const std::size_t length = data_begin + std::stoul(end.token) + around - 1;
      if (length < bytes.size()) lengths.push_back(length);
    }
  }
  for (const std::size_t length : lengths) {
    write_file(folder_.path() / kShard, std::string_view(bytes).substr(0, length));
    const Refusal refusal = open();
    ASSERT_EQ(refusal.file, kShard) << "cut at " << length;
    ASSERT_NE(refusal.message.find("truncated"), std::string::npos) << refusal.message;
  }
}

// ---- JSON ---------------------------------------------------------------------------------------

std::string nested(std::size_t lists) { return std::string(lists, '[') + std::string(lists, ']'); }

TEST_F(Malformed, Nesting) {
  TinyCheckpoint checkpoint = sound_;
  checkpoint.config.set("extra", JsonNode::raw(nested(63)));  // in the root: 64 levels
  checkpoint.index.set("extra", JsonNode::raw(nested(63)));
  EXPECT_EQ(open(checkpoint).message, "");
  for (const std::size_t depth : {64, 65, 100'000}) {
    checkpoint = sound_;
    checkpoint.config.set("extra", JsonNode::raw(nested(depth)));
    expect_refused(checkpoint, "config.json", "", "deeper than 64");
    checkpoint = sound_;
    checkpoint.index.set("extra", JsonNode::raw(nested(depth)));
    expect_refused(checkpoint, kIndex, "", "deeper than 64");
    checkpoint = sound_;
    checkpoint.shards[1].header.set("extra", JsonNode::raw(nested(depth)));
    expect_refused(checkpoint, kShard, "", "deeper than 64");
  }
}

TEST_F(Malformed, StringsAndNumbers) {
  const std::string million(std::size_t{1} << 20, '1');
  for (const std::string& value :
       {'"' + million + '"', million, std::string("\"\xff\""), std::string("\"\xc0\x80\""),
        std::string("\"\xed\xa0\x80\""), std::string("\"\xf4\x90\x80\x80\""),
        std::string("\"\x01\""), std::string("\"\\ud800\""), std::string("\"\\x\""),
        std::string("\"\0\"", 3), std::string("01"), std::string("1."), std::string("+1"),
        std::string("NaN"), std::string("1e999"), std::string("nul"), std::string("1 2"),
        std::string("\"a")}) {
    for (int part = 0; part < 3; ++part) {
      TinyCheckpoint checkpoint = sound_;
      JsonNode& tree = part == 0   ? checkpoint.config
                       : part == 1 ? checkpoint.index
                                   : checkpoint.shards[1].header;
      tree.set("extra", JsonNode::raw(value));
      const Refusal refusal = open(checkpoint);
      EXPECT_EQ(refusal.file, part == 0   ? "config.json"
                              : part == 1 ? kIndex
                                          : kShard)
          << value.substr(0, 20);
      EXPECT_GE(refusal.offset, 0) << refusal.message;
    }
  }
}

TEST_F(Malformed, KeysThatAreThereTwice) {
  const auto twice = [](JsonNode& object, std::size_t i) {
    object.members.push_back(object.members.at(i));
  };
  TinyCheckpoint checkpoint = sound_;
  twice(checkpoint.config, 4);
  expect_refused(checkpoint, "config.json", "vocab_size", "twice");
  checkpoint = sound_;
  twice(*checkpoint.config.find("rope_scaling"), 1);
  expect_refused(checkpoint, "config.json", "factor", "twice");
  checkpoint = sound_;
  twice(checkpoint.index, 1);
  expect_refused(checkpoint, kIndex, "weight_map", "twice");
  checkpoint = sound_;
  twice(*checkpoint.index.find("weight_map"), 0);
  expect_refused(checkpoint, kIndex, "model.embed_tokens.weight", "twice");
  checkpoint = sound_;
  twice(*checkpoint.index.find("metadata"), 0);
  expect_refused(checkpoint, kIndex, "total_size", "twice");
  checkpoint = sound_;
  twice(checkpoint.shards[1].header, 1);
  expect_refused(checkpoint, kShard, "model.layers.1.input_layernorm.weight", "twice");
  checkpoint = sound_;
  twice(checkpoint.shards[1].header, 0);
  expect_refused(checkpoint, kShard, "__metadata__", "twice");
  checkpoint = sound_;
  twice(*checkpoint.shards[1].header.find("__metadata__"), 0);
  expect_refused(checkpoint, kShard, "__metadata__", "'format' is there twice");
  for (std::size_t field = 0; field < 3; ++field) {
    checkpoint = sound_;
    twice(*checkpoint.shards[1].header.find("model.norm.weight"), field);
    expect_refused(checkpoint, kShard, "model.norm.weight", "twice");
  }
}

TEST_F(Malformed, TooMuchOfAnything) {
  const auto many = [](std::size_t count, const std::string& value) {
    JsonNode object = JsonNode::object({});
    for (std::size_t i = 0; i < count; ++i) {
      object.members.push_back({'"' + std::to_string(i) + '"', JsonNode::raw(value)});
    }
    return object;
  };
  TinyCheckpoint checkpoint = sound_;
  checkpoint.config.set("extra", many(std::size_t{1} << 18, "0"));
  expect_refused(checkpoint, "config.json", "", "values");
  checkpoint = sound_;
  checkpoint.shards[1].header.set("__metadata__", many((std::size_t{1} << 16) + 1, "\"\""));
  expect_refused(checkpoint, kShard, "__metadata__", "too many keys; the limit is 65536");
  checkpoint = sound_;
  for (const JsonNode::Member& member : many(257, "0").members) {
    checkpoint.index.members.push_back(member);
  }
  EXPECT_NE(open(checkpoint).message.find("too many keys"), std::string::npos);
  checkpoint = sound_;
  JsonNode& map = *checkpoint.index.find("weight_map");
  for (std::size_t i = 0; i <= checkpoint::kMaxShards; ++i) {
    map.members.push_back(
        {"\"t" + std::to_string(i) + '"', JsonNode::text(std::to_string(i) + ".safetensors")});
  }
  EXPECT_NE(open(checkpoint).message.find("1024 shards"), std::string::npos);
}

// The last size that is read is told apart from the first that is not by what is said of it: a file
// of nothing but zeros is sparse, and no JSON.
TEST_F(Malformed, FileSizes) {
  for (const auto& [name, limit] : {std::pair("config.json", checkpoint::kMaxConfigBytes),
                                    std::pair(kIndex, checkpoint::kMaxIndexBytes),
                                    std::pair(kShard, checkpoint::kMaxHeaderBytes)}) {
    for (const std::uint64_t bytes : {limit, limit + 1}) {
      sound_.write(folder_.path());
      fs::remove(folder_.path() / name);
      std::string length;
      if (name == kShard) {
        for (int i = 0; i < 8; ++i) length += static_cast<char>(bytes >> (8 * i));
      }
      write_file(folder_.path() / name, length);
      fs::resize_file(folder_.path() / name, length.size() + bytes);
      const Refusal refusal = open();
      EXPECT_EQ(refusal.file, name) << refusal.message;
      const std::string words =
          std::to_string(bytes) + " bytes; the limit is " + std::to_string(limit);
      EXPECT_EQ(refusal.message.find(words) != std::string::npos, bytes > limit) << refusal.message;
    }
  }
}

TEST_F(Malformed, TooManyTensorsInTheIndex) {
  TinyCheckpoint checkpoint = sound_;
  std::string map = R"({"0":"x.safetensors")";
  for (std::size_t i = 1; i <= checkpoint::kMaxIndexTensors; ++i) {
    map += ",\"" + std::to_string(i) + R"(":"x.safetensors")";
  }
  checkpoint.index.set("weight_map", JsonNode::raw(map + "}"));
  expect_refused(checkpoint, kIndex, std::to_string(checkpoint::kMaxIndexTensors),
                 "more than 640000 tensors");
}

// What costs most to read is bounded apart; what is cheap may fill a file.
TEST_F(Malformed, NumbersAndEscapesInAll) {
  const auto list = [](std::size_t bytes, const std::string& value) {
    std::string text = "[" + value;
    for (std::size_t i = 1; i < bytes / value.size(); ++i) text += "," + value;
    return JsonNode::raw(text + "]");
  };
  constexpr std::size_t kLimit = std::size_t{8} << 20;
  const std::string escaped = '"' + std::string(510, ' ') + "\\n\"";
  const std::string number = "1" + std::string(999, '0');
  for (const std::string& value : {escaped, std::string("\"\xc3\xa4\""), '-' + number + "e-999"}) {
    const std::size_t most = value.size() < 100 ? 200'000 * value.size() : kLimit;
    for (const char* name : {"config.json", kIndex}) {
      TinyCheckpoint checkpoint = sound_;
      JsonNode& tree = name == kIndex ? checkpoint.index : checkpoint.config;
      tree.set("extra", list(most - 100'000, value));
      EXPECT_EQ(open(checkpoint).message, "");
      if (most < kLimit) continue;
      tree.set("extra", list(kLimit + 10'000, value));
      expect_refused(checkpoint, name, "", "of more than 8388608 bytes in all");
    }
  }
  TinyCheckpoint checkpoint = sound_;
  checkpoint.config.set("extra", list(kLimit + 10'000, '"' + std::string(510, ' ') + '"'));
  EXPECT_EQ(open(checkpoint).message, "");
  checkpoint.config.set("extra", JsonNode::raw(number + std::string(25, '0')));
  expect_refused(checkpoint, "config.json", "", "a number of more than 1024 bytes");
}

// Where the parser is led past plain strings and white space, offsets and contents must not suffer.
TEST_F(Malformed, OffsetsAmongSpacesEscapesAndNumbers) {
  const std::string before =
      "{ \n\t\"a\" :\r[ 1 ,-2.5e1, true,null , \"x\\\"y\", \"\", \"\xc3\xa4\" ,{\"b\":\"c\"} ]  , "
      " ";
  write_file(folder_.path() / "config.json", before + "\"a\" : 1 }");
  Refusal refusal = open();
  EXPECT_NE(refusal.message.find("twice"), std::string::npos) << refusal.message;
  EXPECT_EQ(refusal.tensor, "a");
  EXPECT_EQ(refusal.offset, static_cast<std::int64_t>(before.size()));
  for (const std::string bad : {"\"k\" 1", "\"k\": \"v\" \"w\"", "\"k\":  ]", "7"}) {
    write_file(folder_.path() / "config.json", before + bad + "}");
    refusal = open();
    EXPECT_NE(refusal.message.find("not valid JSON"), std::string::npos) << refusal.message;
    EXPECT_GE(refusal.offset, static_cast<std::int64_t>(before.size())) << refusal.message;
    EXPECT_LE(refusal.offset, static_cast<std::int64_t>(before.size() + bad.size()));
  }
}

// ---- names and files ----------------------------------------------------------------------------

TEST_F(Malformed, ShardNames) {
  for (const std::string name :
       {"..", ".", "", "/", "../x.safetensors", "a/b.safetensors", "/x.safetensors", "x.bin",
        "x.safetensors/", "x.safetensors\\u0000", "\\u0000.safetensors", "x.SAFETENSORS"}) {
    TinyCheckpoint checkpoint = sound_;
    checkpoint.index.find("weight_map")->set("lm_head.weight", JsonNode::text(name));
    expect_refused(checkpoint, kIndex, "lm_head.weight", "bare name");
  }
  TinyCheckpoint checkpoint = sound_;
  const std::string longest(243, 'x');
  checkpoint.index.find("weight_map")
      ->set("lm_head.weight", JsonNode::text(longest + "x.safetensors"));
  expect_refused(checkpoint, kIndex, "lm_head.weight", "a string of 256 bytes");
  for (const char* value : {"1", "null", "[]", "{}", "true"}) {
    checkpoint = sound_;
    checkpoint.index.find("weight_map")->set("lm_head.weight", JsonNode::raw(value));
    expect_refused(checkpoint, kIndex, "lm_head.weight", "weight_map must be");
    checkpoint = sound_;
    checkpoint.index.set("weight_map", JsonNode::raw(value));
    if (value[0] != '{') expect_refused(checkpoint, kIndex, "weight_map", "must be an object");
  }
}

TEST_F(Malformed, TensorsInTheWrongPlace) {
  const std::string other = sound_.shards[0].name;
  JsonNode* map = sound_.index.find("weight_map");
  TinyCheckpoint checkpoint = sound_;
  checkpoint.shards.push_back(
      {"model-extra.safetensors", sound_.shards[1].header, sound_.shards[1].data});
  checkpoint.index.find("weight_map")->set("x", JsonNode::text("model-extra.safetensors"));
  const Refusal twice = open(checkpoint);
  EXPECT_NE(twice.message.find("as well"), std::string::npos) << twice.message;
  fs::remove(folder_.path() / "model-extra.safetensors");

  sound_.write(folder_.path());
  fs::remove(folder_.path() / kShard);
  const auto catalogue = checkpoint::Catalogue::open(folder_.path());
  EXPECT_TRUE(catalogue.in_absent_shard("model.norm.weight"));
  Refusal absent = open();
  EXPECT_EQ(absent.file, kShard);
  EXPECT_NE(absent.message.find("download it"), std::string::npos) << absent.message;
  map->remove("model.layers.1.input_layernorm.weight");
  write_file(folder_.path() / kIndex, sound_.index.write());
  absent = open();
  EXPECT_NE(absent.message.find("its shards are not there"), std::string::npos) << absent.message;
  fs::remove(folder_.path() / other);
  absent = open();
  EXPECT_NE(absent.message.find("none of the 2 shards"), std::string::npos) << absent.message;
}

TEST_F(Malformed, HolesOverlapsAndTails) {
  const auto with = [&](auto change) {
    TinyCheckpoint checkpoint = sound_;
    change(checkpoint.shards[1]);
    return checkpoint;
  };
  expect_refused(with([](TinyShard& shard) { shard.header.remove("model.norm.weight"); }), kShard,
                 "lm_head.weight", "hole");
  expect_refused(with([](TinyShard& shard) { shard.data += "1234567"; }), kShard, "",
                 "7 trailing bytes");
  expect_refused(with([](TinyShard& shard) {
                   shard.header.set("second", *shard.header.find("model.norm.weight"));
                 }),
                 kShard, "second", "overlaps");
  expect_refused(with([](TinyShard& shard) {
                   shard.header.find("model.norm.weight")
                       ->set("shape", JsonNode::array({std::int64_t{1} << 40, 1 << 30}));
                 }),
                 kShard, "model.norm.weight", "overflows");
  expect_refused(with([](TinyShard& shard) { shard.header = JsonNode::raw(""); }), kShard, "",
                 "must begin with");
}

TEST_F(Malformed, WeightsOfOtherKinds) {
  TinyCheckpoint checkpoint = make_tiny_checkpoint(TinyKind::kCompressed);
  const std::string module = "model.layers.0.mlp.up_proj";
  checkpoint.shards[0].header.set(
      module + ".weight", JsonNode::raw("{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}"));
  expect_refused(checkpoint, "model.safetensors", module + ".weight_packed", "is there as");
  for (const char* dtype : {"I16", "F16"}) {  // as wide as BF16
    checkpoint = make_tiny_checkpoint(TinyKind::kBf16);
    checkpoint.shards[0].header.find(module + ".weight")->set("dtype", JsonNode::text(dtype));
    expect_refused(checkpoint, "model.safetensors", module + ".weight", dtype);
    checkpoint = make_tiny_checkpoint(TinyKind::kBf16);
    checkpoint.shards[0].header.find("model.norm.weight")->set("dtype", JsonNode::text(dtype));
    expect_refused(checkpoint, "model.safetensors", "model.norm.weight", dtype);
  }
}

TEST_F(Malformed, WhatIsNoFile) {
  const auto replaced = [&](const char* name, const auto& put) {
    for (const auto& entry : fs::directory_iterator(folder_.path())) fs::remove_all(entry.path());
    sound_.write(folder_.path());
    fs::remove(folder_.path() / name);
    put(folder_.path() / name);
  };
  for (const char* name :
       {"config.json", "generation_config.json", "hf_quant_config.json", kIndex, kShard}) {
    replaced(name, [](const fs::path& path) { fs::create_directory(path); });
    EXPECT_NE(open().message.find("not a regular file"), std::string::npos) << name;
    replaced(name, [](const fs::path& path) { ASSERT_EQ(::mkfifo(path.c_str(), 0600), 0); });
    EXPECT_NE(open().message.find("not a regular file"), std::string::npos) << name;
    replaced(name, [](const fs::path& path) { fs::create_symlink(path.filename(), path); });
    try {
      open();
      ADD_FAILURE() << name;
    } catch (const IoError& error) {
      EXPECT_EQ(error.error_number(), ELOOP);
      EXPECT_EQ(fs::path(error.file()).filename(), name);
    }
    replaced(name, [this](const fs::path& path) {
      const fs::path target = path.parent_path() / "elsewhere";
      for (const auto& [file, bytes] : sound_.files()) {
        if (file == path.filename()) write_file(target, bytes);
      }
      fs::create_symlink("elsewhere", path);
    });
    EXPECT_EQ(open().message, "") << name;
  }
  EXPECT_THROW(checkpoint::Catalogue::open(folder_.path() / "absent"), IoError);
  const ScratchFolder empty;
  EXPECT_THROW(checkpoint::read_config(empty.path()), CheckpointError);
  EXPECT_THROW(checkpoint::Catalogue::open(empty.path()), CheckpointError);
}

}  // namespace
}  // namespace dsfp4::testing
