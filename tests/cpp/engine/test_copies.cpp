// Copies between RAM and an emulated device, timed one way at a time.
#include <array>
#include <vector>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "emulated/emulated_ops.h"
#include "engine/copies.h"
#include "memory/arena.h"

namespace dsfp4::engine {
namespace {

using ops::Queue;
using ops::testing::EmulatedOps;

constexpr double kRate = 3e7;  // bytes per second that copies are held to
constexpr std::size_t kBytes = 4096;
constexpr double kSeconds = 0.02;

class Copies : public ::testing::TestWithParam<CopyWay> {
 protected:
  Queue used() const { return GetParam() == CopyWay::kIn ? Queue::kUpload : Queue::kDownload; }
  Queue other() const { return GetParam() == CopyWay::kIn ? Queue::kDownload : Queue::kUpload; }
  double rate(const Poll& poll = {}) {
    return copy_rate(*ops_.emulated(), GetParam(), blocks_, kBytes, kSeconds, poll);
  }

  EmulatedOps ops_{{.copy_bytes_per_second = kRate}};
  memory::Arena ram_{3 * memory::Arena::padded(kBytes), "the test's blocks",
                     ops_.emulated()->staging()};
  const std::array<std::byte*, 3> blocks_{block(), block(), block()};

 private:
  std::byte* block() { return memory::on_host(ops_.emulated()->staging(), ram_.take(kBytes)); }
};

TEST_P(Copies, GoOneWayNoFasterThanItsWire) {
  const double measured = rate();
  EXPECT_GT(measured, 0.0);
  EXPECT_LT(measured, kRate * 1.1);  // and a part of the one under way at the start
  const ops::testing::EmulatedCounts counts = ops_.emulated()->counts();
  EXPECT_GT(counts.bytes_in(used()), static_cast<std::int64_t>(3 * kBytes));
  EXPECT_EQ(counts.bytes_in(other()), 0);
  EXPECT_EQ(ops_.emulated()->memory().used(), 0u);
}

TEST_P(Copies, OneThatFailsEndsThemAndGivesTheMemoryBack) {
  for (const std::int64_t n : {1, 2, 5}) {
    ops_.emulated()->fail_copy(used(), n);
    EXPECT_THROW(rate(), CudaError);
    ops_.emulated()->clear_error();
    EXPECT_EQ(ops_.emulated()->memory().used(), 0u);
  }
}

TEST_P(Copies, CanBeLeft) {
  struct Left {};
  EXPECT_THROW(rate([] { throw Left(); }), Left);
  EXPECT_EQ(ops_.emulated()->memory().used(), 0u);
}

INSTANTIATE_TEST_SUITE_P(Ways, Copies, ::testing::Values(CopyWay::kIn, CopyWay::kOut));

}  // namespace
}  // namespace dsfp4::engine
