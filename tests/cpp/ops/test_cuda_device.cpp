// Copies, events and queues of a GPU, by the interface of devices.
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "ops/cuda_device.h"
#include "ops/cuda_fixture.h"

namespace dsfp4::ops {
namespace {

constexpr Queue kQueues[] = {Queue::kCompute, Queue::kUpload, Queue::kDownload};

class CudaDeviceTest : public Cuda {
 protected:
  static constexpr std::size_t kBytes = std::size_t{3} << 20;

  void SetUp() override {
    Cuda::SetUp();
    if (backend_ == nullptr) return;
    device_ = &backend_->device();
    staging_ = std::make_unique<memory::Arena>(3 * kBytes, "the test's copies", device_->staging());
  }
  template <typename T>
  T* staged(std::size_t count) {
    return memory::on_host(device_->staging(), staging_->take_array<T>(count));
  }
  // Adds 1 to every value of `y`, `times` times: some milliseconds of work where both are large.
  void add_ones(Matrix ones, Matrix y, int times) {
    for (int i = 0; i < times; ++i) backend_->add(ones, y);
  }
  Matrix of_ones(std::int64_t rows, std::int64_t cols) {
    OwnedMatrix ones(rows, cols);
    ones.values.assign(ones.values.size(), 1.0f);
    return on_device(ones);
  }

  Device* device_ = nullptr;
  std::unique_ptr<memory::Arena> staging_;
};

// From `in` through `there` to `out`, by all pairs of queues.
void expect_copies(Device& device, std::byte* in, DevicePtr<std::byte> there, std::byte* out,
                   std::size_t bytes) {
  const Event copied = device.make_event();
  const Event back = device.make_event();
  EXPECT_TRUE(device.passed(copied));  // it was never recorded
  device.wait_for(copied);
  int pattern = 1;
  for (const Queue from : kQueues) {
    for (const Queue to : kQueues) {
      std::memset(in, pattern++, bytes);
      device.copy_in(from, in, there, bytes);
      device.record(from, copied);
      device.wait(to, copied);
      device.copy_out(to, there, out, bytes);
      device.record(to, back);
      device.wait_for(back);
      EXPECT_TRUE(device.passed(back));
      EXPECT_TRUE(device.passed(copied));
      EXPECT_EQ(std::memcmp(in, out, bytes), 0) << pattern;
    }
  }
}

TEST_F(CudaDeviceTest, CopiesFromEveryQueueToEveryQueue) {
  auto* in = staged<std::byte>(kBytes);
  expect_copies(*device_, in, arena_->take(kBytes), staged<std::byte>(kBytes), kBytes);
}

TEST_F(CudaDeviceTest, CopiesMemoryThatIsNotPinned) {
  cuda::Plugin plugin = cuda_plugin();
  plugin.pin = [](cuda::Device*, std::byte*, std::size_t) { return false; };
  CudaDevice device(plugin, 0, 0);
  memory::Arena there(kBytes, "the test's copies", device.memory());
  memory::Arena here(2 * kBytes, "the test's copies", device.staging());
  auto* in = memory::on_host(device.staging(), here.take(kBytes));
  expect_copies(device, in, there.take(kBytes),
                memory::on_host(device.staging(), here.take(kBytes)), kBytes);
}

TEST_F(CudaDeviceTest, ARefusalToPinLeavesNoErrorBehind) {
  const cuda::Plugin& plugin = cuda_plugin();
  OpenDevice device(plugin, 0, false);
  std::byte* block = memory::host_memory().allocate(4096);
  ASSERT_TRUE(plugin.pin(device, block, 4096));
  EXPECT_FALSE(plugin.pin(device, block, 4096));  // it is already
  EXPECT_NE(plugin.failure()->code, 0);
  EXPECT_TRUE(plugin.synchronize(device));
  EXPECT_TRUE(plugin.unpin(device, block));
  memory::host_memory().release(block, 4096);
}

TEST_F(CudaDeviceTest, ADownloadWaitsForTheOpsBeforeItsEvent) {
  constexpr int kTimes = 200;
  const Matrix ones = of_ones(1024, 8192);
  const Matrix y = on_device(OwnedMatrix(1024, 8192));
  auto* out = staged<float>(8192);
  const Event computed = device_->make_event();
  const Event downloaded = device_->make_event();
  for (int round = 0; round < 3; ++round) {
    backend_->zero(y);
    add_ones(ones, y, kTimes);
    device_->record(Queue::kCompute, computed);
    device_->wait(Queue::kDownload, computed);
    device_->copy_out(Queue::kDownload, y.row(1023), out, 8192 * sizeof(float));
    device_->record(Queue::kDownload, downloaded);
    while (!device_->passed(downloaded)) std::this_thread::yield();
    for (int i = 0; i < 8192; ++i) ASSERT_EQ(out[i], static_cast<float>(kTimes)) << i;
  }
}

// The first time that is asked for is of before the clocks were compared, the last of afterwards.
TEST_F(CudaDeviceTest, TimedEventsPassOnTheHostsClock) {
  constexpr auto kSlack = std::chrono::milliseconds(50);  // where a sanitizer slows down each call
  const Matrix ones = of_ones(1024, 8192);
  const Matrix y = on_device(OwnedMatrix(1024, 8192));
  const Event begin = device_->make_timed_event();
  const Event end = device_->make_timed_event();
  backend_->zero(y);
  device_->synchronize();
  for (int round = 0; round < 2; ++round) {
    const auto before = Device::Clock::now();
    device_->record(Queue::kCompute, begin);
    add_ones(ones, y, 100);
    device_->record(Queue::kCompute, end);
    device_->wait_for(end);
    const auto after = Device::Clock::now();
    EXPECT_GE(device_->time_of(begin), before - kSlack) << round;
    EXPECT_LT(device_->time_of(begin), device_->time_of(end)) << round;
    EXPECT_LE(device_->time_of(end), after + kSlack) << round;
  }
}

TEST_F(CudaDeviceTest, SynchronizeWaitsForEveryQueue) {
  const Matrix ones = of_ones(1024, 8192);
  const Matrix y = on_device(OwnedMatrix(1024, 8192));
  auto* out = staged<float>(8192);
  const Event computed = device_->make_event();
  backend_->zero(y);
  add_ones(ones, y, 100);
  device_->record(Queue::kCompute, computed);
  for (const Queue queue : {Queue::kUpload, Queue::kDownload}) {
    device_->wait(queue, computed);
    device_->copy_out(queue, y.row(7), out, 8192 * sizeof(float));
  }
  device_->synchronize();
  EXPECT_EQ(out[0], 100.0f);
  EXPECT_EQ(out[8191], 100.0f);
}

// Another thread's copies, events and pinned memory neither end nor enter what is recorded.
TEST_F(CudaDeviceTest, OtherThreadsGoOnWhileSegmentsAreRecorded) {
  const Matrix ones = of_ones(4, 512);
  const Matrix y = on_device(OwnedMatrix(4, 512));
  backend_->zero(y);
  auto* in = staged<std::byte>(kBytes);
  auto* out = staged<std::byte>(kBytes);
  std::memset(in, 5, kBytes);
  const DevicePtr<std::byte> there = arena_->take(kBytes);
  device_->synchronize();
  std::atomic<bool> done = false;
  std::thread other([&] {
    const Event event = device_->make_event();
    while (!done) {
      device_->copy_in(Queue::kUpload, in, there, kBytes);
      device_->record(Queue::kUpload, event);
      device_->wait(Queue::kCompute, event);
      device_->record(Queue::kCompute, event);
      device_->wait(Queue::kDownload, event);
      device_->copy_out(Queue::kDownload, there, out, kBytes);
      device_->record(Queue::kDownload, event);
      device_->wait_for(event);
      device_->synchronize();
      std::byte* more = device_->staging().allocate(4096);
      if (more != nullptr) device_->staging().release(more, 4096);
    }
  });
  constexpr std::int64_t kParts = 60;
  for (int step = 0; step < 4; ++step) {
    for (std::int64_t part = 0; part < kParts; ++part) {
      backend_->segment({part, {}, {}}, [&] { add_ones(ones, y, 3); });
    }
  }
  done = true;
  other.join();
  EXPECT_EQ(on_host(y), std::vector<float>(4 * 512, 4.0f * 3.0f * kParts));
  EXPECT_EQ(std::memcmp(in, out, kBytes), 0);
}

}  // namespace
}  // namespace dsfp4::ops
