// The wires between RAM, processor and device, measured on the emulated device.
#include <functional>
#include <memory>
#include <string>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "emulated/emulated_ops.h"
#include "engine/bench_wires.h"

namespace dsfp4::engine {
namespace {

using ops::testing::EmulatedOps;

constexpr double kRate = 3e7;  // bytes per second that copies are held to

WireOptions options(format::WeightFormat format = format::WeightFormat::kNvfp4) {
  WireOptions options;
  options.format = format;
  options.hidden_size = 128;
  options.moe_intermediate_size = 64;
  options.top_k = 4;
  options.bytes = 400'000;
  options.seconds = 0.02;
  return options;
}

class BenchWires : public ::testing::TestWithParam<format::WeightFormat> {};

TEST_P(BenchWires, MeasuresEachWireAloneAndBothAtOnce) {
  EmulatedOps device({.copy_bytes_per_second = kRate});
  const auto host = ops::make_reference_ops(1);
  const WireRates rates = measure_wires(device, *host, options(GetParam()));
  EXPECT_GT(rates.copies, 0.0);
  EXPECT_GT(rates.host, 0.0);
  EXPECT_GT(rates.copies_beside, 0.0);
  EXPECT_GT(rates.host_beside, 0.0);
  EXPECT_EQ(rates.together(), rates.copies_beside + rates.host_beside);
  // No copy is faster than the wire, and none is counted that was not made.
  EXPECT_LT(rates.copies, kRate * 1.001);
  EXPECT_LT(rates.copies_beside, kRate * 1.1);  // and a part of the one under way at the start
  const ops::testing::EmulatedCounts counts = device.emulated()->counts();
  EXPECT_GT(counts.bytes_in(ops::Queue::kUpload), 0);
  EXPECT_EQ(counts.ops, 0);  // the device's own arithmetic has no part in it
  EXPECT_EQ(device.emulated()->memory().used(), 0u);
  EXPECT_EQ(device.emulated()->staging().used(), 0u);
}

INSTANTIATE_TEST_SUITE_P(Formats, BenchWires,
                         ::testing::Values(format::WeightFormat::kBF16,
                                           format::WeightFormat::kFp8Block,
                                           format::WeightFormat::kNvfp4,
                                           format::WeightFormat::kMxfp4));

TEST(BenchWiresFaults, ACopyThatFailsEndsItAndGivesEverythingBack) {
  const auto host = ops::make_reference_ops(1);
  for (const std::int64_t n : {1, 7, 100}) {
    EmulatedOps device({.copy_bytes_per_second = kRate});
    device.emulated()->fail_copy(ops::Queue::kUpload, n);
    EXPECT_THROW(measure_wires(device, *host, options()), CudaError) << n;
    EXPECT_EQ(device.emulated()->memory().used(), 0u);
    EXPECT_EQ(device.emulated()->staging().used(), 0u);
  }
}

TEST(BenchWiresFaults, TooLittleMemoryIsSaid) {
  const auto host = ops::make_reference_ops(1);
  EmulatedOps no_vram({.memory_limit = 4096});
  EXPECT_THROW(measure_wires(no_vram, *host, options()), MemoryLimitError);
  EmulatedOps no_staging({.staging_limit = 4096});
  EXPECT_THROW(measure_wires(no_staging, *host, options()), MemoryLimitError);
  EXPECT_EQ(no_staging.emulated()->memory().used(), 0u);
}

TEST(BenchWiresFaults, BadOptionsAreNamed) {
  EmulatedOps device;
  const auto host = ops::make_reference_ops(1);
  const auto expect = [&](const char* name, const std::function<void(WireOptions&)>& spoil) {
    WireOptions bad = options();
    spoil(bad);
    try {
      measure_wires(device, *host, bad);
      FAIL() << name;
    } catch (const ParameterError& error) {
      EXPECT_EQ(error.parameter(), name);
    }
  };
  expect("hidden_size", [](WireOptions& o) { o.hidden_size = 0; });
  expect("hidden_size", [](WireOptions& o) { o.hidden_size = 100; });
  expect("moe_intermediate_size", [](WireOptions& o) { o.moe_intermediate_size = -1; });
  expect("moe_intermediate_size", [](WireOptions& o) { o.moe_intermediate_size = 1 << 20; });
  expect("top_k", [](WireOptions& o) { o.top_k = 0; });
  expect("seconds", [](WireOptions& o) { o.seconds = 0.0; });
}

}  // namespace
}  // namespace dsfp4::engine
