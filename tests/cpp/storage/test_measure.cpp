#include <atomic>
#include <cerrno>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "storage/measure.h"
#include "storage/reader_fixture.h"

namespace dsfp4::storage {
namespace {

class Measure : public ReaderTest {};

TEST_P(Measure, DemandsAreTimedAloneAndBesideSpeculation) {
  const auto path = files_.write("a", 100 * kBlockBytes, 1);
  const DemandLatency latency =
      measure_demand_beside_speculation({path}, options(), kBlockBytes, 2, 3);
  EXPECT_EQ(latency.idle_seconds.size(), 3u);
  EXPECT_EQ(latency.beside_seconds.size(), 3u);
  EXPECT_EQ(latency.stats.bytes_speculative, 6 * kBlockBytes);
}

// It must not be waited for then: it never reads as much as a demand beside it is to meet.
TEST_P(Measure, SpeculationThatFailsEarlyEndsTheMeasurement) {
  const auto path = files_.write("a", 100 * kBlockBytes, 1);
  std::atomic<int> reads = 0;
  system_.before = [&](ReadCall&) -> std::optional<int> {
    return ++reads > 4 ? std::optional(-EACCES) : std::nullopt;  // two demands come first
  };
  EXPECT_THROW(measure_demand_beside_speculation({path}, options(), kBlockBytes, 2, 3), IoError);
}

TEST_P(Measure, FilesThatCannotBeMeasuredAreNamed) {
  const auto absent = files_.folder() / "absent";
  try {
    measure_raw_rate({absent}, options(), 0.1);
    FAIL();
  } catch (const IoError& error) {
    EXPECT_EQ(error.file(), absent.string());
    EXPECT_EQ(error.error_number(), ENOENT);
  }
  EXPECT_THROW(measure_raw_rate({files_.write("a", 1000, 1)}, options(), 0.1), ParameterError);
}

INSTANTIATE_TEST_SUITE_P(Kinds, Measure, testing::Values(ReaderKind::kUring, ReaderKind::kPread),
                         kind_name);

}  // namespace
}  // namespace dsfp4::storage
