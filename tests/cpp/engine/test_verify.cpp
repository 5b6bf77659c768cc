#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "base/thread_pool.h"
#include "checkpoint/tiny_checkpoint.h"
#include "engine/verify.h"
#include "storage/faults.h"

namespace dsfp4::engine {
namespace {

class Verify : public storage::ReaderTest {
 protected:
  Verify() : checkpoint_(testing::make_tiny_checkpoint(testing::TinyKind::kNvfp4)) {
    checkpoint_.write(folder_.path());
  }

  testing::ScratchFolder folder_;
  testing::TinyCheckpoint checkpoint_;
};

TEST_P(Verify, AnyNumberOfThreadsFindsTheSame) {
  ASSERT_TRUE(verify(folder_.path(), 1, true, {}, {}, options()).wrote);
  for (const int threads : {1, 2, 5}) {
    std::vector<std::pair<std::uint64_t, std::uint64_t>> progress;
    const VerifyReport report = verify(
        folder_.path(), threads, false,
        [&](std::uint64_t done, std::uint64_t total) { progress.emplace_back(done, total); }, {},
        options());
    EXPECT_TRUE(report.compared);
    EXPECT_TRUE(report.problems.empty()) << report.problems.front().problem;
    EXPECT_TRUE(std::ranges::is_sorted(progress));
    EXPECT_EQ(progress.back(), std::pair(report.bytes, report.bytes));
  }
}

// While a read does not come back, others compute with the process's threads, and it can be left.
TEST_P(Verify, AStalledReadHoldsNoThreadsAndCanBeLeft) {
  const auto shard = folder_.path() / checkpoint_.shards.front().name;
  static auto& kept = *new std::vector<std::unique_ptr<storage::FaultAt>>;  // outlives its threads
  kept.push_back(
      std::make_unique<storage::FaultAt>(storage::Fault::kStallForever, 3, shard.string()));
  storage::FaultAt& system = *kept.back();
  storage::ReaderOptions reading = options();
  reading.system = &system;
  reading.stall_limit = std::chrono::hours(1);
  std::atomic<int> computed = 0;
  const Poll poll = [&] {
    if (!system.injected()) return;
    ThreadPool(2).parallel_for(2, 1, [&](std::int64_t, std::int64_t) { ++computed; });
    if (computed >= 10) throw std::runtime_error("enough");
  };
  EXPECT_THROW(verify(folder_.path(), 2, false, {}, poll, reading), std::runtime_error);
  EXPECT_EQ(computed, 10);
  system.wait_for_threads();
}

INSTANTIATE_TEST_SUITE_P(Kinds, Verify,
                         ::testing::Values(storage::ReaderKind::kUring,
                                           storage::ReaderKind::kPread),
                         storage::kind_name);

}  // namespace
}  // namespace dsfp4::engine
