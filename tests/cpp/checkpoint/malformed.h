// What the tests of malformed checkpoints share: a sound checkpoint to damage, and what reading a
// folder says.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include <gtest/gtest.h>

#include "checkpoint/catalogue.h"
#include "checkpoint/config.h"
#include "checkpoint/layout.h"
#include "checkpoint/tiny_checkpoint.h"
#include "dsfp4/error.h"

namespace dsfp4::testing {

// What a CheckpointError said; all empty if there was none.
struct Refusal {
  std::string file, tensor, message;
  std::int64_t offset = -1;
};

class Malformed : public ::testing::Test {
 protected:
  Refusal open(const TinyCheckpoint& checkpoint) {
    checkpoint.write(folder_.path());
    return open();
  }

  Refusal open() {
    try {
      const auto config = checkpoint::read_config(folder_.path());
      const auto catalogue = checkpoint::Catalogue::open(folder_.path());
      checkpoint::resolve_layout(catalogue, config);
    } catch (const CheckpointError& error) {
      return {std::filesystem::path(error.file()).filename().string(), error.tensor(), error.what(),
              error.offset()};
    }
    return {};
  }

  void expect_refused(const TinyCheckpoint& checkpoint, const std::string& file,
                      const std::string& tensor, const std::string& words = "") {
    const Refusal refusal = open(checkpoint);
    EXPECT_EQ(refusal.file, file) << refusal.message;
    EXPECT_EQ(refusal.tensor, tensor) << refusal.message;
    EXPECT_NE(refusal.message.find(words), std::string::npos) << refusal.message;
  }

  // A sound checkpoint that needs what is not supported: what the error said, which must name the
  // file and the tensor or field.
  void expect_unsupported(const TinyCheckpoint& checkpoint, const std::string& file,
                          const std::string& name, const std::string& words) {
    std::string message;
    try {
      message = "CheckpointError: " + open(checkpoint).message;
    } catch (const UnsupportedError& error) {
      message = error.what();
    }
    EXPECT_NE(message.find(file + ": '" + name + "'"), std::string::npos) << name << message;
    EXPECT_NE(message.find(words), std::string::npos) << message;
  }

  TinyCheckpoint sound_ = make_tiny_checkpoint(TinyKind::kNvfp4);
  ScratchFolder folder_;
};

inline constexpr const char* kIndex = "model.safetensors.index.json";
inline constexpr const char* kShard = "model-00002-of-00002.safetensors";

}  // namespace dsfp4::testing
