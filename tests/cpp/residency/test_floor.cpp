#include <gtest/gtest.h>

#include "residency/floor.h"

namespace dsfp4::residency {
namespace {

constexpr std::uint64_t kRouted = 11'500'000'000;  // of R1 in NVFP4

ModelBytes model() {
  ModelBytes model;
  model.layers = {700'000'000, 300'000'000};
  return model;
}

Plan plan(std::size_t device_slots) {
  Plan plan;
  plan.tiered = true;
  plan.device_slots = device_slots;
  return plan;
}

TEST(Floor, TheSlowestWireDecides) {
  const Rates target{.ssd = 14e9, .both_host_experts = 20e9, .both_copy_in = 40e9};
  const auto seconds = [&](const HitRates& hits) {
    return least_decode_seconds(plan(8), model(), kRouted, hits, target).value();
  };
  EXPECT_DOUBLE_EQ(seconds({0.1, 0.3}), 0.6 * 11.5 / 14.0);  // 2.0 tokens/s
  EXPECT_DOUBLE_EQ(seconds({0.1, 0.9}), 0.9 * 11.5 / 60.0);
  EXPECT_DOUBLE_EQ(seconds({1.0, 0.0}), 0.0);
}

TEST(Floor, WithoutAGpuTheProcessorComputesAll) {
  const Rates rates{.ssd = 1e9, .host_experts = 23e9};
  EXPECT_DOUBLE_EQ(*least_decode_seconds(plan(0), model(), kRouted, {0.0, 1.0}, rates), 0.5);
  Plan loaded = plan(0);
  loaded.tiered = false;
  EXPECT_DOUBLE_EQ(*least_decode_seconds(loaded, model(), kRouted, {}, rates), 0.5);
}

TEST(Floor, StreamedLayersCrossTheSsdEachTime) {
  Plan streams = plan(0);
  streams.streamed = {true, false};
  const Rates rates{.ssd = 1e9, .host_experts = 23e9};
  EXPECT_DOUBLE_EQ(*least_decode_seconds(streams, model(), kRouted, {0.0, 1.0}, rates), 0.7);
}

TEST(Floor, NeedsTheRatesOfTheWiresInUse) {
  const auto known = [](const HitRates& hits, const Rates& rates) {
    return least_decode_seconds(plan(8), model(), kRouted, hits, rates).has_value();
  };
  EXPECT_FALSE(known({0.0, 0.5}, {.both_host_experts = 1e9, .both_copy_in = 1e9}));
  EXPECT_FALSE(known({0.0, 0.5}, {.ssd = 1e9, .both_host_experts = 1e9}));
  EXPECT_FALSE(known({0.0, 0.5}, {.ssd = 1e9, .host_experts = 1e9, .copy_in = 1e9}));
  EXPECT_TRUE(known({0.0, 1.0}, {.both_host_experts = 1e9, .both_copy_in = 1e9}));
  EXPECT_TRUE(known({1.0, 0.0}, {}));
}

}  // namespace
}  // namespace dsfp4::residency
