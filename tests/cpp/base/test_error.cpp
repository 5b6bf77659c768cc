#include <cerrno>
#include <string>

#include <gtest/gtest.h>

#include "dsfp4/error.h"

namespace dsfp4 {
namespace {

TEST(Error, CheckpointErrorNamesFileTensorAndByte) {
  const CheckpointError error("a.safetensors", "model.norm.weight", 17, "overlaps");
  EXPECT_STREQ(error.what(), "a.safetensors: 'model.norm.weight' at byte 17: overlaps");
  EXPECT_EQ(error.offset(), 17);
}

TEST(Error, CheckpointErrorLeavesOutWhatIsNotKnown) {
  EXPECT_STREQ(CheckpointError("config.json", "", -1, "is missing").what(),
               "config.json: is missing");
}

TEST(Error, IoErrorNamesErrno) {
  const std::string what = IoError("f", 4096, EIO, "the read failed").what();
  EXPECT_EQ(what.find("f at byte 4096: the read failed (errno 5: "), 0u) << what;
}

TEST(Error, MemoryLimitErrorGivesBothNumbers) {
  const MemoryLimitError error("the weights", 400'000'000'000, 96'000'000'000);
  EXPECT_STREQ(error.what(), "the weights need 400.000 GB of RAM and 96.000 GB are available");
}

}  // namespace
}  // namespace dsfp4
