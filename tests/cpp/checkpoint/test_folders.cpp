// Checkpoint folders as people have them: stale indices, other files beside the shards, downloads
// that stopped, pointers in the place of files.
#include <filesystem>
#include <string>
#include <vector>

#include "checkpoint/malformed.h"
#include "checkpoint/safetensors.h"
#include "dsfp4/error.h"
#include "dsfp4/log.h"

namespace dsfp4::testing {
namespace {

namespace fs = std::filesystem;

constexpr const char* kFirst = "model-00001-of-00002.safetensors";
constexpr const char* kWhole = "model.safetensors";
constexpr const char* kPointer =
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 5234139343\n";

class Folders : public Malformed {
 protected:
  // The error of opening, of whatever type: "IoError: ...", empty if nothing.
  std::string said() {
    try {
      return open().message;
    } catch (const Error& error) {
      return error.what();
    }
  }

  void expect_said(const std::vector<std::string>& words) {
    const std::string message = said();
    for (const std::string& word : words) {
      EXPECT_NE(message.find(word), std::string::npos) << word << " in: " << message;
    }
  }

  std::vector<std::string> files_read() {
    std::vector<std::string> names;
    const auto catalogue = checkpoint::Catalogue::open(folder_.path());
    for (const fs::path& file : catalogue.files()) names.push_back(file.filename());
    return names;
  }
};

TEST_F(Folders, StaleEntriesOfTheIndexDoNoHarm) {
  sound_.index.find("weight_map")->set("gone", JsonNode::text(kFirst));
  sound_.index.find("weight_map")
      ->set("model.layers.0.mlp.up_proj.pre_quant_scale", JsonNode::text(kShard));
  EXPECT_EQ(open(sound_).message, "");
}

TEST_F(Folders, AStaleEntryOfATensorThatIsNeededIsNamed) {
  TinyShard& shard = sound_.shards[1];
  shard.rename("model.norm.weight", "model.layers.1.self_attn.rotary_emb.inv_freq");
  expect_refused(sound_, kShard, "model.norm.weight", "index places this tensor here");
}

TEST_F(Folders, AnEntryMayNameAnotherShard) {
  sound_.index.find("weight_map")->set("model.norm.weight", JsonNode::text(kFirst));
  EXPECT_EQ(open(sound_).message, "");
}

TEST_F(Folders, TheIndexDecidesWhichFilesAreRead) {
  const std::vector<std::string> shards = {kFirst, kShard};
  sound_.write(folder_.path());
  for (const char* other : {kWhole, "consolidated.safetensors", "model-00001-of-00009.safetensors",
                            "adapter_model.safetensors"}) {
    write_file(folder_.path() / other, TinyCheckpoint::file_of(sound_.shards[0]));
    EXPECT_EQ(said(), "") << other;
    EXPECT_EQ(files_read(), shards) << other;
  }
  std::string logged;
  set_log_callback([&](LogLevel, std::string_view message) { logged += message; });
  write_file(folder_.path() / "broken.safetensors", "x");
  EXPECT_EQ(said(), "");
  set_log_callback({});
  EXPECT_NE(logged.find("and 4 more are not read: '"), std::string::npos) << logged;
}

TEST_F(Folders, WithoutAnIndexModelSafetensorsDecides) {
  const TinyCheckpoint whole = make_tiny_checkpoint(TinyKind::kCompressed);
  whole.write(folder_.path());
  for (const char* other : {kFirst, "consolidated.safetensors"}) {
    write_file(folder_.path() / other, TinyCheckpoint::file_of(sound_.shards[0]));
    EXPECT_EQ(said(), "") << other;
    EXPECT_EQ(files_read(), std::vector<std::string>{kWhole}) << other;
  }
}

TEST_F(Folders, AnIndexNoneOfWhoseShardsIsThereYieldsToModelSafetensors) {
  TinyCheckpoint whole = make_tiny_checkpoint(TinyKind::kCompressed);
  whole.index = sound_.index;
  EXPECT_EQ(open(whole).message, "");
  EXPECT_EQ(files_read(), std::vector<std::string>{kWhole});
}

TEST_F(Folders, ShardsWithoutAnyIndexAreAllRead) {
  sound_.index = JsonNode::raw("");
  EXPECT_EQ(open(sound_).message, "");
  EXPECT_EQ(files_read(), (std::vector<std::string>{kFirst, kShard}));
}

// ---- types that are not known ----------------------------------------------------------------

// Appends a tensor of `bytes` bytes with a type that the helper for known ones does not have.
void add_unknown(TinyShard& shard, const std::string& tensor, std::string_view dtype,
                 std::int64_t bytes) {
  const auto begin = static_cast<std::int64_t>(shard.data.size());
  shard.data.append(static_cast<std::size_t>(bytes), '\0');
  shard.header.set(tensor,
                   JsonNode::object({{"dtype", JsonNode::text(dtype)},
                                     {"shape", JsonNode::array({3, 2})},
                                     {"data_offsets", JsonNode::array({begin, begin + bytes})}}));
}

TEST_F(Folders, UnknownTypesOfTensorsThatNobodyNeeds) {
  std::int64_t bytes = 0;
  for (const char* dtype : {"F4", "C64", "F6_E2M3", "F8_E4M3FNUZ", "NEW", ""}) {
    add_unknown(sound_.shards[1], std::string("mtp.0.x") + dtype, dtype, bytes++);
  }
  EXPECT_EQ(open(sound_).message, "");
}

TEST_F(Folders, UnknownTypesOfTensorsThatAreNeeded) {
  for (const char* dtype : {"F4", "C64"}) {
    TinyCheckpoint checkpoint = sound_;
    checkpoint.shards[1].header.find("model.norm.weight")->set("dtype", JsonNode::text(dtype));
    expect_refused(checkpoint, kShard, "model.norm.weight", std::string("is ") + dtype + " [32]");
    checkpoint = sound_;
    const std::string matrix = "model.layers.1.mlp.experts.0.up_proj.weight";
    checkpoint.shards[1].header.find(matrix)->set("dtype", JsonNode::text(dtype));
    expect_refused(checkpoint, kShard, matrix, std::string("is ") + dtype);
  }
  TinyCheckpoint checkpoint = sound_;
  checkpoint.shards[1]
      .header.find("model.norm.weight")
      ->set("dtype", JsonNode::text("A_NAME_OF_16_BYT"));
  expect_refused(checkpoint, kShard, "model.norm.weight", "the limit is 15");
}

TEST_F(Folders, UnknownTypesAreNoHoleInTheChecksOfOffsets) {
  add_unknown(sound_.shards[1], "mtp.0.x", "F4", 3);
  JsonNode* offsets = sound_.shards[1].header.find("mtp.0.x")->find("data_offsets");
  const auto begin = static_cast<std::int64_t>(sound_.shards[1].data.size()) - 3;
  *offsets = JsonNode::array({begin, begin + 4});
  expect_refused(sound_, kShard, "mtp.0.x", "truncated");
  *offsets = JsonNode::array({begin, begin + 2});
  expect_refused(sound_, kShard, "", "trailing");
  *offsets = JsonNode::array({begin - 1, begin + 3});
  expect_refused(sound_, kShard, "mtp.0.x", "overlap");
}

// ---- headers -----------------------------------------------------------------------------------

// The shard's file with its header padded by spaces to `bytes`.
std::string padded(const TinyShard& shard, std::size_t bytes) {
  std::string header = shard.header.write();
  header.append(bytes - header.size(), ' ');
  std::string file;
  for (int i = 0; i < 8; ++i) file += static_cast<char>(header.size() >> (8 * i));
  return file + header + shard.data;
}

TEST_F(Folders, HeadersPaddedWithSpaces) {
  sound_.write(folder_.path());
  const std::size_t bytes = sound_.shards[1].header.write().size();
  for (const std::size_t more : {std::size_t{1}, std::size_t{7}, std::size_t{4096}}) {
    write_file(folder_.path() / kShard, padded(sound_.shards[1], bytes + more));
    EXPECT_EQ(said(), "") << more;
  }
}

// All of DeepSeek-R1 in NVFP4 in one file: 187,000 tensors, a header of 25 MB.
TEST_F(Folders, HeadersOfTheLargestModelInOneFile) {
  ASSERT_GE(checkpoint::kMaxHeaderBytes, 25'000'000u);
  sound_.write(folder_.path());
  write_file(folder_.path() / kShard, padded(sound_.shards[1], checkpoint::kMaxHeaderBytes));
  EXPECT_EQ(said(), "");
}

// ---- downloads that stopped, and what is no file ----------------------------------------------

TEST_F(Folders, AGitLfsPointerIsNamed) {
  for (const char* name : {kShard, "config.json", kIndex, "generation_config.json"}) {
    sound_.write(folder_.path());
    write_file(folder_.path() / name, kPointer);
    expect_said({name, "is a Git LFS pointer", "5234139343 bytes", "git lfs pull"});
  }
}

TEST_F(Folders, ALinkThatLeadsNowhereIsNamed) {
  for (const char* name : {kShard, "config.json"}) {
    sound_.write(folder_.path());
    fs::remove(folder_.path() / name);
    fs::create_symlink("../../blobs/1234", folder_.path() / name);
    expect_said({name, "is a link to '../../blobs/1234', which is not there", "download"});
    fs::remove(folder_.path() / name);
  }
  const TinyCheckpoint whole = make_tiny_checkpoint(TinyKind::kCompressed);
  fs::remove(folder_.path() / kIndex);
  whole.write(folder_.path());
  fs::remove(folder_.path() / kWhole);
  fs::create_symlink("nowhere", folder_.path() / kWhole);
  expect_said({kWhole, "is a link to 'nowhere', which is not there", "download"});
}

TEST_F(Folders, ADownloadThatStoppedIsNamed) {
  const std::string part = std::string(kShard) + ".incomplete";
  sound_.write(folder_.path());
  fs::remove(folder_.path() / kShard);
  write_file(folder_.path() / part, "x");
  expect_said({kShard, part, "has not ended", "download"});

  fs::remove(folder_.path() / part);  // as `hf download --local-dir` leaves it
  const fs::path hidden = folder_.path() / ".cache" / "huggingface" / "download";
  fs::create_directories(hidden);
  write_file(hidden / (std::string(kShard) + ".1234.incomplete"), "x");
  expect_said({kShard, ".1234.incomplete", "has not ended", "download"});

  fs::remove(folder_.path() / kFirst);
  fs::remove(folder_.path() / kIndex);
  fs::remove_all(hidden);
  write_file(folder_.path() / part, "x");
  expect_said({"no *.safetensors file", part, "has not ended", "download"});
}

TEST_F(Folders, ARepositoryOfTheHubsCacheIsNotOne) {
  fs::create_directories(folder_.path() / "snapshots" / "0123");
  expect_said({"is a repository in the Hub's cache", "snapshots"});
}

TEST_F(Folders, AnEmptyNameIsNoFolder) {
  EXPECT_THROW(checkpoint::read_config(""), ParameterError);
}

}  // namespace
}  // namespace dsfp4::testing
