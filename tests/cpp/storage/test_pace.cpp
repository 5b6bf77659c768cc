// The arithmetic of a slow disk, on instants that no clock has shown.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "storage/pace.h"

namespace dsfp4::storage {
namespace {

using Clock = Pace::Clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr std::uint64_t kRate = 1'000'000'000;  // a byte takes a nanosecond

Clock::time_point at(std::int64_t ns) { return Clock::time_point(std::chrono::nanoseconds(ns)); }

TEST(Pace, WithoutARateNothingIsHeld) {
  Pace pace(0);
  EXPECT_FALSE(pace.limits());
  pace.spend(at(0), 1000);  // harmless
  EXPECT_TRUE(Pace(kRate).limits());
}

TEST(Pace, OneReadComesAfterTheOther) {
  Pace pace(kRate);
  EXPECT_EQ(pace.due(at(500), 1000), at(1500));
  pace.give(at(500), 1000, at(1500));
  EXPECT_EQ(pace.due(at(600), 1000), at(2500));
  pace.give(at(600), 1000, at(2700));  // late
  EXPECT_EQ(pace.due(at(600), 1000), at(3500));
}

TEST(Pace, TimeWithoutReadsIsNotMadeUpFor) {
  Pace pace(kRate);
  pace.give(at(0), 1000, at(1000));
  EXPECT_EQ(pace.due(at(1'000'000'000), 1000), at(1'000'001'000));
}

TEST(Pace, LatenessIsMadeUpForUpToALimit) {
  Pace pace(kRate);
  pace.give(at(0), 1000, at(50'000'000));
  EXPECT_EQ(pace.due(at(0), 1000), at(49'001'000));
}

TEST(Pace, ReadsThatNobodyWaitsForTakeTheirTime) {
  Pace pace(kRate);
  pace.spend(at(0), 5000);
  EXPECT_EQ(pace.due(at(0), 1000), at(6000));
}

// Reads that arrive when they like, in bursts and after gaps, and are given back more or less late.
TEST(Pace, NoSpanSeesMoreThanTheRate) {
  constexpr std::uint64_t kMost = 1'000'000;
  for (unsigned seed = 0; seed < 20; ++seed) {
    std::mt19937 random(seed);
    const auto up_to = [&](std::int64_t most) {
      return std::uniform_int_distribution<std::int64_t>(0, most)(random);
    };
    Pace pace(kRate);
    std::vector<std::pair<std::int64_t, std::uint64_t>> given;
    std::int64_t now = 0;
    for (int i = 0; i < 1000; ++i) {
      const std::uint64_t bytes = 1 + static_cast<std::uint64_t>(up_to(kMost - 1));
      const std::int64_t begun = std::max<std::int64_t>(0, now - up_to(3'000'000));
      if (up_to(20) == 0) now += up_to(30'000'000);  // nothing to do, or the disk hangs
      now = std::max(now, pace.due(at(begun), bytes).time_since_epoch().count()) + up_to(200'000);
      pace.give(at(begun), bytes, at(now));
      given.emplace_back(now, bytes);
    }
    for (std::size_t first = 0; first < given.size(); ++first) {
      std::uint64_t sum = 0;
      for (std::size_t i = first; i < given.size(); ++i) {
        sum += given[i].second;
        const auto span = static_cast<std::uint64_t>(given[i].first - given[first].first);
        ASSERT_LE(sum, span + 1'000'000 + kMost) << "seed " << seed << ", " << first << " to " << i;
      }
    }
  }
}

// With enough to read, the rate is reached, though whoever gives back is always a little late.
TEST(Pace, TheRateIsReached) {
  Pace pace(kRate);
  std::int64_t now = 0;
  constexpr std::uint64_t kBytes = 100'000;
  for (int i = 0; i < 1000; ++i) {
    now = std::max(now, pace.due(at(0), kBytes).time_since_epoch().count() + i % 3 * 30'000);
    pace.give(at(0), kBytes, at(now));
  }
  EXPECT_LE(now, 100'060'000);
}

}  // namespace
}  // namespace dsfp4::storage
