#include <chrono>
#include <cstdint>
#include <filesystem>
#include <string>
#include <unistd.h>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "base/files.h"
#include "base/trace.h"
#include "dsfp4/error.h"

namespace dsfp4 {
namespace {

class TraceTest : public testing::Test {
 protected:
  ~TraceTest() override { std::filesystem::remove(path_); }
  std::filesystem::path path_ =
      std::filesystem::path(testing::TempDir()) / ("trace." + std::to_string(::getpid()) + ".json");
};

TEST_F(TraceTest, HoldsEverySpanOnItsTrack) {
  constexpr int kSpans = 5000;  // more than are kept in memory
  {
    Trace trace(path_);
    const auto start = Trace::Clock::now();
    for (int i = 0; i < kSpans; ++i) {
      const auto at = start + std::chrono::microseconds(10 * i);
      trace.span(Trace::Track::kCompute, "layer 3", at, at + std::chrono::microseconds(4));
      trace.span(Trace::Track::kReads, "layer 3 expert 7", at, at + std::chrono::microseconds(25),
                 1234);
    }
  }
  const auto events = nlohmann::json::parse(read_whole_file(path_));
  int computed = 0;
  int begun = 0;
  int ended = 0;
  std::string tracks;
  for (const auto& event : events) {
    const std::string phase = event.at("ph");
    if (phase == "M" && event.at("name") == "thread_name") {
      tracks += std::string(event.at("args").at("name")) + " ";
    }
    if (phase == "X") {
      ++computed;
      EXPECT_EQ(event.at("dur"), 4);
      EXPECT_EQ(event.at("tid"), 1);
    }
    if (phase == "b") {
      EXPECT_EQ(event.at("id"), ++begun);
      EXPECT_EQ(event.at("args").at("bytes"), 1234);
    }
    if (phase == "e") {
      EXPECT_EQ(event.at("id"), ++ended);
    }
  }
  EXPECT_EQ(tracks, "steps CPU waits SSD PCIe GPU ");
  EXPECT_EQ(computed, kSpans);
  EXPECT_EQ(begun, kSpans);
  EXPECT_EQ(ended, kSpans);
}

TEST_F(TraceTest, APlaceThatCannotBeWrittenIsAnError) {
  try {
    const Trace trace("/no/such/folder/trace.json");
    FAIL();
  } catch (const IoError& error) {
    EXPECT_EQ(error.file(), "/no/such/folder/trace.json");
  }
}

}  // namespace
}  // namespace dsfp4
