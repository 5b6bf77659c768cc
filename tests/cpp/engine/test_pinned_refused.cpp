// A system that pins less memory than a model beside a GPU wants, or none: it runs all the same,
// and says once that it is slower.
#include <cstdint>

#include <gtest/gtest.h>

#include "base/warnings.h"
#include "dsfp4/error.h"
#include "engine/three_tiers_fixture.h"

namespace dsfp4::engine {
namespace {

using dsfp4::testing::Warnings;

constexpr const char* kRefused = "refused to pin";

class PinnedRefused : public ThreeTiersFixture {
 protected:
  static LoadOptions options() {
    LoadOptions options = load_options();
    options.strategy.max_experts = 3;
    options.strategy.cpu_cache_size = 40e3 * 1e-9;
    options.memory.cpu_share = 0.5;
    return options;
  }
  static ops::testing::EmulatedOptions pins(std::size_t bytes) {
    ops::testing::EmulatedOptions device = as_a_gpu();
    device.pinned_limit = bytes;
    return device;
  }
};

TEST_P(PinnedRefused, IsSaidOnceAndChangesNoBit) {
  for (const std::size_t bytes : {0, 6'000, 40'000}) {
    const Warnings warnings;
    const auto engine = load(options(), pins(bytes));
    EXPECT_EQ(ask(*engine), right_) << bytes;
    EXPECT_EQ(ask(*engine), right_) << bytes;
    const ModelStats stats = engine->stats();
    EXPECT_GT(stats.uploads, 0u);
    EXPECT_GT(stats.cpu_bytes, 0u);
    EXPECT_GT(device_->counts().unpinned, 0) << bytes;
    EXPECT_EQ(warnings.with(kRefused).size(), 1u) << bytes;
  }
}

TEST_P(PinnedRefused, IsNotSaidWhereAllIsPinned) {
  const Warnings warnings;
  const auto engine = load(options(), as_a_gpu());
  EXPECT_EQ(ask(*engine), right_);
  EXPECT_EQ(device_->counts().unpinned, 0);
  EXPECT_TRUE(warnings.with(kRefused).empty());
}

TEST_P(PinnedRefused, AlsoWhenTheSlotsGrowLater) {
  const auto engine = load(options(), as_a_gpu());
  EXPECT_EQ(ask(*engine), right_);
  EXPECT_EQ(device_->counts().unpinned, 0);
  const Warnings warnings;
  device_->staging().set_pinned_limit(device_->staging().used());
  MemoryStrategy larger = options().strategy;
  larger.cpu_cache_size = 2 * *larger.cpu_cache_size;
  engine->set_memory_strategy(larger);
  EXPECT_EQ(ask(*engine), right_);
  EXPECT_GT(device_->counts().unpinned, 0);
  engine->set_memory_strategy(options().strategy);  // fits again
  const std::int64_t before = device_->counts().unpinned;
  EXPECT_EQ(ask(*engine), right_);
  EXPECT_EQ(device_->counts().unpinned, before);
  EXPECT_EQ(warnings.with(kRefused).size(), 1u);
}

TEST_P(PinnedRefused, AnErrorOfTheDeviceLeavesEverythingInOrder) {
  const auto engine = load(options(), pins(0));
  for (std::int64_t n = 1; n < 60; n += 9) {
    device_->fail_copy(ops::Queue::kUpload, n % 9 + 1);
    EXPECT_THROW(ask(*engine), CudaError) << n;
    device_->clear_error();
    EXPECT_EQ(ask(*engine), right_) << n;
  }
}

TEST_P(PinnedRefused, ALackOfRamIsStillAnError) {
  ops::testing::EmulatedOptions device = pins(0);
  device.staging_limit = 20'000;
  EXPECT_THROW(load(options(), device), MemoryLimitError);
  EXPECT_EQ(device_->staging().used(), 0u);
}

INSTANTIATE_TEST_SUITE_P(Kinds, PinnedRefused, ::testing::ValuesIn(dsfp4::testing::kTinyKinds));

}  // namespace
}  // namespace dsfp4::engine
