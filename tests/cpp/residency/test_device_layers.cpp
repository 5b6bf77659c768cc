// Dense weights that are copied from RAM to a device for every step.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "base/files.h"
#include "base/trace.h"
#include "dsfp4/error.h"
#include "emulated/emulated_device.h"
#include "memory/arena.h"
#include "residency/device_layers.h"

namespace dsfp4::residency {
namespace {

using ops::Queue;
using ops::testing::EmulatedDevice;

constexpr std::uint64_t kMostBytes = 5000;

// `count` of 3 + 2 * count layers, every other one, each of its own size and bytes.
class DeviceLayersTest : public ::testing::Test {
 protected:
  DeviceLayers& make(std::size_t count, std::size_t buffers) {
    staging_ = std::make_unique<memory::Arena>(count * kMostBytes, "a test", device_.staging());
    memory_ = std::make_unique<memory::Arena>(buffers * kMostBytes, "a test", device_.memory());
    std::vector<DevicePtr<std::byte>> to(buffers);
    for (auto& buffer : to) buffer = memory_->take(kMostBytes / 256 * 256);
    for (std::size_t i = 0; i < count; ++i) {
      StagedLayer layer;
      layer.layer = static_cast<std::int64_t>(3 + 2 * i);
      layer.bytes = 4000 - 300 * i;
      std::byte* const from = memory::on_host(device_.staging(), staging_->take(layer.bytes));
      std::memset(from, static_cast<int>(i + 1), layer.bytes);
      layer.from = from;
      layer.to = to[i % buffers];
      layers_.push_back(layer);
    }
    made_ = std::make_unique<DeviceLayers>(layers_, buffers, device_);
    return *made_;
  }
  ~DeviceLayersTest() override { device_.synchronize(); }

  // As a step's ops find it.
  void expect_there(std::int64_t number) {
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      if (layers_[i].layer != number) continue;
      std::vector<std::byte> found(layers_[i].bytes);
      device_.download(layers_[i].to, found.data(), found.size());
      EXPECT_EQ(found, std::vector<std::byte>(found.size(), static_cast<std::byte>(i + 1)))
          << number;
    }
  }
  void enter_and_leave(std::int64_t layer) {
    DenseLayers::Use use(made_.get(), layer);
    ASSERT_TRUE(use.enter());
    expect_there(layer);
  }
  std::uint64_t all_bytes() const {
    std::uint64_t bytes = 0;
    for (const StagedLayer& layer : layers_) bytes += layer.bytes;
    return bytes;
  }

  EmulatedDevice device_;
  std::unique_ptr<memory::Arena> staging_, memory_;
  std::vector<StagedLayer> layers_;
  std::unique_ptr<DeviceLayers> made_;
};

TEST_F(DeviceLayersTest, EachIsCopiedOnceAStepAheadOfItsOps) {
  for (const std::size_t buffers : {2u, 3u, 4u}) {
    layers_.clear();
    const DeviceLayers& stream = make(5, buffers);
    device_.delay_copies(Queue::kUpload, std::chrono::milliseconds(1));
    for (int step = 1; step <= 3; ++step) {
      for (std::int64_t layer = 0; layer < 15; ++layer) enter_and_leave(layer);
      const std::uint64_t steps = static_cast<std::uint64_t>(step) * all_bytes();
      EXPECT_LE(stream.stats().copied_bytes, steps + (buffers - 1) * 4000);  // of the next step
      // With more buffers some layers have one to themselves.
      if (buffers == 2) {
        EXPECT_GE(stream.stats().copied_bytes, steps);
      }
    }
    device_.delay_copies(Queue::kUpload, {});
    device_.synchronize();
  }
}

TEST_F(DeviceLayersTest, ACopyIsSpreadOverTheLayersBefore) {
  make(4, 2);
  enter_and_leave(0);
  const std::uint64_t first = made_->stats().copied_bytes;
  EXPECT_EQ(first, 1334u);  // a third of layer 3
  enter_and_leave(1);
  EXPECT_EQ(made_->stats().copied_bytes, 2667u);
  enter_and_leave(2);
  EXPECT_EQ(made_->stats().copied_bytes, 4000u);
  enter_and_leave(3);
  EXPECT_EQ(made_->stats().copied_bytes, 4000u + 1850);  // half of layer 5
}

TEST_F(DeviceLayersTest, NoBufferIsFilledWhileOpsReadIt) {
  make(5, 2);
  enter_and_leave(3);
  device_.hold(Queue::kCompute);
  {
    DenseLayers::Use use(made_.get(), 5);
    ASSERT_TRUE(use.enter());
  }
  for (const std::int64_t layer : {6, 7, 8}) {  // 7 comes into the buffer of 3, 9 into that of 5
    DenseLayers::Use use(made_.get(), layer);
    ASSERT_TRUE(use.enter());
  }
  device_.let_go(Queue::kCompute);
  enter_and_leave(9);
}

// The last one's buffer is the first one's of the next step, too.
TEST_F(DeviceLayersTest, NoLayerGivesWayToOneThatComesLater) {
  make(4, 3);
  for (int piece = 0; piece < 20; ++piece) enter_and_leave(7);  // as a long prompt does
  const std::uint64_t copied = layers_[2].bytes + layers_[3].bytes;
  EXPECT_EQ(made_->stats().copied_bytes, copied);
  enter_and_leave(8);
  enter_and_leave(9);
  EXPECT_EQ(made_->stats().copied_bytes, copied);
  enter_and_leave(0);  // a third of layer 3
  EXPECT_EQ(made_->stats().copied_bytes, copied + 1334);
}

TEST_F(DeviceLayersTest, WithoutOverlapTheHostWaitsForEachAndCopiesNoneAhead) {
  make(4, 2);
  const auto waits = [&](std::int64_t layer) {
    const std::int64_t before = device_.counts().host_waits;
    const DenseLayers::Use entered(made_.get(), layer);
    EXPECT_TRUE(made_->enter(layer));
    return device_.counts().host_waits - before;
  };
  EXPECT_EQ(waits(3), 0);
  made_->overlap(false);
  const std::uint64_t copied = made_->stats().copied_bytes;
  EXPECT_EQ(waits(4), 0);
  EXPECT_EQ(made_->stats().copied_bytes, copied);
  EXPECT_EQ(waits(7), 1);
  EXPECT_EQ(made_->stats().copied_bytes, copied + layers_[2].bytes);
}

TEST_F(DeviceLayersTest, AnyOrderOfLayersFindsItsWeights) {
  for (const std::size_t buffers : {2u, 3u}) {
    for (const std::size_t count : {buffers + 1, std::size_t{7}}) {
      layers_.clear();
      make(count, buffers);
      std::mt19937 random(static_cast<unsigned>(10 * buffers + count));
      const std::size_t layers = 4 + 2 * count;
      std::int64_t at = 0;
      for (int i = 0; i < 300; ++i) {  // mostly the next one, now and then another step's
        at = random() % 4 == 0 ? static_cast<std::int64_t>(random() % layers)
                               : (at + 1) % static_cast<std::int64_t>(layers);
        if (random() % 8 == 0) device_.delay_copy(Queue::kUpload, 1, std::chrono::milliseconds(1));
        enter_and_leave(at);
      }
      device_.synchronize();
    }
  }
}

TEST_F(DeviceLayersTest, AfterAnErrorNothingCountsAsCopied) {
  DeviceLayers& stream = make(4, 2);
  for (std::int64_t layer = 0; layer < 5; ++layer) enter_and_leave(layer);
  device_.fail_copy(Queue::kUpload, 1);
  EXPECT_THROW(
      {
        for (std::int64_t layer = 5; layer < 11; ++layer) {
          DenseLayers::Use use(&stream, layer);
          use.enter();
          device_.synchronize();
        }
      },
      CudaError);
  device_.clear_error();
  stream.forget();
  for (std::int64_t layer = 0; layer < 11; ++layer) enter_and_leave(layer);
}

// Ops that the device has not come to when the layers are forgotten.
TEST_F(DeviceLayersTest, WhatIsForgottenStaysUntilItsOpsHaveReadIt) {
  DeviceLayers& stream = make(5, 2);
  memory::Arena read(kMostBytes, "a test", device_.staging());
  std::byte* const found = memory::on_host(device_.staging(), read.take(layers_[0].bytes));
  ASSERT_TRUE(stream.enter(3));
  device_.hold(Queue::kCompute);
  device_.copy_out(Queue::kCompute, layers_[0].to, found, layers_[0].bytes);
  stream.forget();
  ASSERT_TRUE(stream.enter(7));                               // into the same buffer
  std::this_thread::sleep_for(std::chrono::milliseconds(5));  // time for a copy that does not wait
  device_.let_go(Queue::kCompute);
  device_.synchronize();
  EXPECT_EQ(std::count(found, found + layers_[0].bytes, std::byte{1}),
            static_cast<std::ptrdiff_t>(layers_[0].bytes));
}

TEST_F(DeviceLayersTest, WaitsOfOpsAreCountedOnceTheyAreOver) {
  DeviceLayers& stream = make(5, 2);
  device_.hold(Queue::kUpload);
  ASSERT_TRUE(stream.enter(3));
  stream.leave(3);
  ASSERT_TRUE(stream.enter(4));
  EXPECT_EQ(stream.stats().wait_seconds, 0.0);
  std::this_thread::sleep_for(std::chrono::milliseconds(5));  // in which the ops' queue stands
  device_.let_go(Queue::kUpload);
  device_.synchronize();
  EXPECT_EQ(stream.stats().wait_seconds, 0.0);
  ASSERT_TRUE(stream.enter(5));
  EXPECT_GT(stream.stats().wait_seconds, 0.0);
  // One that is entered again meanwhile keeps the wait that it has.
  device_.synchronize();
  const ops::Event begun = device_.make_event();
  device_.hold(Queue::kUpload);
  ASSERT_TRUE(stream.enter(11));
  stream.leave(11);
  device_.record(Queue::kDownload, begun);
  while (!device_.passed(begun)) std::this_thread::yield();
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  const double before = stream.stats().wait_seconds;
  ASSERT_TRUE(stream.enter(11));
  device_.let_go(Queue::kUpload);
  device_.synchronize();
  ASSERT_TRUE(stream.enter(12));
  EXPECT_GT(stream.stats().wait_seconds, before + 1e-3);
  // A device that has failed tells no times.
  device_.fail_copy(Queue::kUpload, 1);
  EXPECT_THROW(
      {
        for (std::int64_t layer = 6; layer < 13; ++layer) enter_and_leave(layer);
      },
      CudaError);
  device_.clear_error();
  for (std::int64_t layer = 0; layer < 13; ++layer) enter_and_leave(layer);
}

TEST_F(DeviceLayersTest, CopiesAreSpansOfTheTrace) {
  const auto path = std::filesystem::path(::testing::TempDir()) /
                    ("device_layers." + std::to_string(::getpid()) + ".json");
  {
    Trace trace(path);
    DeviceTrace device_trace(trace, device_, {});
    make(4, 2);
    made_ = std::make_unique<DeviceLayers>(layers_, 2, device_, &device_trace);
    for (std::int64_t layer = 0; layer < 10; ++layer) enter_and_leave(layer);
    device_.synchronize();
  }
  std::map<std::string, std::uint64_t> bytes;
  for (const auto& event : nlohmann::json::parse(read_whole_file(path))) {
    if (event.at("ph") != "X") continue;
    bytes[event.at("name")] += std::uint64_t(event.at("args").at("bytes"));
  }
  std::filesystem::remove(path);
  EXPECT_EQ(bytes["layer 5 dense weights"], layers_[1].bytes);
  EXPECT_EQ(bytes["layer 7 dense weights"], layers_[2].bytes);
  std::uint64_t all = 0;
  for (const auto& [name, copied] : bytes) all += copied;
  EXPECT_EQ(all, made_->stats().copied_bytes);
}

}  // namespace
}  // namespace dsfp4::residency
