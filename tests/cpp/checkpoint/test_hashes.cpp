// The checksum sidecar: written, read, compared, and refused where it is malformed.
#include <array>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>

#include <gtest/gtest.h>

#include "checkpoint/catalogue.h"
#include "checkpoint/hashes.h"
#include "checkpoint/tiny_checkpoint.h"
#include "dsfp4/error.h"
#include "engine/verify.h"

namespace dsfp4 {
namespace {

using checkpoint::TensorHash;
using checkpoint::TensorHashes;
using checkpoint::Xxh3;
using testing::ScratchFolder;

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text));
}

// Values of the reference implementation's command line: `xxhsum -H3`.
TEST(Xxh3, KnownValues) {
  EXPECT_EQ(Xxh3::of({}), 0x2d06800538d394c2u);
  EXPECT_EQ(Xxh3::of(bytes_of("abc")), 0x78af5f94892f3950u);
}

TEST(Xxh3, PiecesMakeTheWhole) {
  std::string text(5000, 'x');
  for (std::size_t i = 0; i < text.size(); ++i) text[i] = static_cast<char>(i * i % 251);
  for (const std::size_t piece : {1u, 7u, 256u, 4999u}) {
    Xxh3 hash;
    for (std::size_t at = 0; at < text.size(); at += piece) {
      hash.update(bytes_of(std::string_view(text).substr(at, piece)));
    }
    EXPECT_EQ(hash.digest(), Xxh3::of(bytes_of(text)));
  }
}

TEST(TensorHashes, ComeBackAsTheyWereWritten) {
  const ScratchFolder folder;
  EXPECT_FALSE(TensorHashes::read(folder.path()));
  const std::string odd = "a \"quoted\"\n\\ name";
  checkpoint::write_tensor_hashes(folder.path(), {{odd, 0x0123456789abcdef}, {"a", 1}});
  const auto hashes = TensorHashes::read(folder.path());
  ASSERT_TRUE(hashes);
  EXPECT_EQ(hashes->size(), 2u);
  EXPECT_EQ(hashes->find(odd), 0x0123456789abcdefu);
  EXPECT_EQ(hashes->find("a"), 1u);
  EXPECT_FALSE(hashes->find("b"));
  EXPECT_FALSE(hashes->problem("a", 1));
  EXPECT_TRUE(hashes->problem("a", 2));
  EXPECT_TRUE(hashes->problem("b", 1));
}

TEST(TensorHashes, AFolderThatCannotBeWrittenIsAnError) {
  const ScratchFolder folder;
  EXPECT_THROW(checkpoint::write_tensor_hashes(folder.path() / "absent", {}), IoError);
}

constexpr std::array kMalformed = {
    "",
    "[]",
    "{}",
    R"({"algorithm": "xxh3-64"})",
    R"({"tensors": {}})",
    R"({"algorithm": "xxh64", "tensors": {}})",
    R"({"algorithm": "xxh3-64", "tensors": []})",
    R"({"algorithm": "xxh3-64", "tensors": "0123456789abcdef"})",
    R"({"algorithm": "xxh3-64", "tensors": {"a": 1}})",
    R"({"algorithm": "xxh3-64", "tensors": {"a": {}}})",
    R"({"algorithm": "xxh3-64", "tensors": {"a": "0123456789abcde"}})",
    R"({"algorithm": "xxh3-64", "tensors": {"a": "0123456789abcdeg"}})",
    R"({"algorithm": "xxh3-64", "tensors": {"a": "+123456789abcdef"}})",
    R"({"algorithm": "xxh3-64", "tensors": {}, "tensors": {}})",
    R"({"algorithm": "xxh3-64", "tensors": {}, "more": 1})",
    R"({"algorithm": "xxh3-64", "tensors": {"a": "0123456789abcdef", "a": "0123456789abcdef"}})",
};

TEST(TensorHashes, MalformedFilesAreNamed) {
  for (const char* text : kMalformed) {
    const ScratchFolder folder;
    testing::write_file(folder.path() / checkpoint::kHashFile, text);
    try {
      TensorHashes::read(folder.path());
      ADD_FAILURE() << text;
    } catch (const CheckpointError& error) {
      EXPECT_EQ(error.file(), (folder.path() / checkpoint::kHashFile).string()) << text;
    }
  }
}

TEST(TensorHashes, TooMuchIsRefused) {
  const ScratchFolder folder;
  const auto refusal = [&] {
    try {
      TensorHashes::read(folder.path());
    } catch (const CheckpointError& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  testing::write_file(folder.path() / checkpoint::kHashFile, "");
  std::filesystem::resize_file(folder.path() / checkpoint::kHashFile,  // sparse: it takes no room
                               checkpoint::kMaxHashFileBytes + 1);
  EXPECT_NE(refusal().find("has 50000001 bytes; the limit is 50000000"), std::string::npos);
  std::string text = R"({"algorithm": "xxh3-64", "tensors": {"0": "0123456789abcdef")";
  for (std::size_t i = 1; i <= checkpoint::kMaxHashes; ++i) {
    text += ",\"" + std::to_string(i) + R"(":"0123456789abcdef")";
  }
  testing::write_file(folder.path() / checkpoint::kHashFile, text + "}}");
  EXPECT_NE(refusal().find("more than 640000 tensors"), std::string::npos) << refusal();
}

TEST(Verify, EveryFlippedByteIsFound) {
  for (const testing::TinyKind kind : testing::kTinyKinds) {
    const ScratchFolder folder;
    testing::TinyCheckpoint tiny = testing::make_tiny_checkpoint(kind);
    tiny.write(folder.path());
    ASSERT_TRUE(engine::verify(folder.path(), 2, true, {}).wrote);
    const auto sound = engine::verify(folder.path(), 1, false, {});
    EXPECT_TRUE(sound.compared);
    EXPECT_TRUE(sound.problems.empty());
    std::string& data = tiny.shards.front().data;
    for (std::size_t at = 0; at < data.size(); at += data.size() / 40 + 1) {
      data[at] = static_cast<char>(data[at] ^ 1);
      tiny.write(folder.path());
      const auto report = engine::verify(folder.path(), 2, true, {});
      data[at] = static_cast<char>(data[at] ^ 1);
      ASSERT_EQ(report.problems.size(), 1u) << at;
      EXPECT_FALSE(report.wrote);
      EXPECT_EQ(report.problems[0].file, (folder.path() / tiny.shards.front().name).string());
    }
  }
}

}  // namespace
}  // namespace dsfp4
