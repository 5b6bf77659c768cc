// The CUDA backend's own part, without a GPU: leftovers when a call fails, and what becomes of
// segments.
#include <chrono>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "base/warnings.h"
#include "dsfp4/error.h"
#include "memory/arena.h"
#include "memory/slot_pool.h"
#include "ops/cuda_backend.h"
#include "ops/fake_cuda.h"

namespace dsfp4::ops {
namespace {

using testing::FakeCuda;

constexpr const char* kRingPinned = "pin 4194304";

TEST(CudaBackendFaults, ADeviceIsClosedWhateverEndsItsConstruction) {
  const cuda::Plugin& plugin = FakeCuda::plugin();
  FakeCuda& fake = FakeCuda::state();
  { const CudaBackend backend(plugin, FakeCuda::kIndex, 0); }
  EXPECT_EQ(fake.devices, 0);
  EXPECT_THROW(CudaBackend(plugin, FakeCuda::kIndex, 1), MemoryLimitError);
  EXPECT_EQ(fake.devices, 0);
  fake.tells_memory = false;
  EXPECT_THROW(CudaBackend(plugin, FakeCuda::kIndex, 0), CudaError);
  EXPECT_EQ(fake.devices, 0);
  fake.opens = false;
  EXPECT_THROW(CudaBackend(plugin, FakeCuda::kIndex, 0), CudaError);
  EXPECT_EQ(fake.devices, 0);
}

TEST(CudaDeviceFaults, StagingMemoryAndEventsAreGivenBack) {
  FakeCuda& fake = FakeCuda::state();
  {
    CudaDevice device(FakeCuda::plugin(), FakeCuda::kIndex, 0);
    EXPECT_FALSE(device.host_visible());
    const memory::Arena arena(4096, "a test", device.staging());
    EXPECT_EQ(fake.pinned.size(), 2u);  // and the plugin's ring
    Event event = device.make_event();
    event = device.make_event();
    EXPECT_TRUE(device.passed(event));
    EXPECT_TRUE(device.passed(Event()));
    EXPECT_THROW(device.record(Queue::kUpload, Event()), std::logic_error);
  }
  EXPECT_TRUE(fake.pinned.empty());
  EXPECT_EQ(fake.events, 0);
}

TEST(CudaDeviceFaults, TimesOfEventsAreTheHosts) {
  FakeCuda& fake = FakeCuda::state();
  CudaDevice device(FakeCuda::plugin(), FakeCuda::kIndex, 0);
  const Event plain = device.make_event();
  EXPECT_EQ(fake.timed_events, 0);
  const Event event = device.make_timed_event();
  EXPECT_EQ(fake.timed_events, 1);
  const auto before = Device::Clock::now();
  const auto clock = device.time_of(event);
  EXPECT_GE(clock, before);
  EXPECT_LE(clock, Device::Clock::now());
  fake.event_time = -0.25;  // before the clock was set
  EXPECT_EQ(clock - device.time_of(event), std::chrono::milliseconds(250));
  EXPECT_EQ(fake.clocks, 2);  // the first makes what the second is timed with
  fake.tells_time = false;
  EXPECT_THROW(device.time_of(event), CudaError);
  EXPECT_THROW(device.time_of(Event()), std::logic_error);
}

TEST(CudaDeviceFaults, MemoryThatIsNotPinnedIsCopiedAllTheSame) {
  const cuda::Plugin& plugin = FakeCuda::plugin();
  FakeCuda& fake = FakeCuda::state();
  const dsfp4::testing::Warnings warnings;
  {
    CudaDevice device(plugin, FakeCuda::kIndex, 0);
    fake.pinnable = cuda::kRingBytes + 10'000;
    memory::Arena pinned(8192, "a test", device.staging());
    memory::Arena refused(8192, "a test", device.staging());
    memory::Arena again(4096, "a test", device.staging());
    memory::Arena device_memory(256, "a test", device.memory());
    const DevicePtr<int> to = device_memory.take_array<int>(1);
    for (memory::Arena* staging : {&pinned, &refused}) {
      int* values = memory::on_host(device.staging(), staging->take_array<int>(2));
      values[0] = 7;
      device.copy_in(Queue::kUpload, values, to, sizeof(int));
      device.copy_out(Queue::kDownload, to, values + 1, sizeof(int));
      device.synchronize();
      EXPECT_EQ(values[1], 7);
    }
  }
  using Calls = std::vector<std::string>;
  EXPECT_EQ(fake.pin_calls,
            (Calls{kRingPinned, "pin 8192", "refused 8192", "refused 4096", "unpin", "unpin"}));
  EXPECT_EQ(warnings.with("(refused)").size(), 1u);
}

TEST(CudaDeviceFaults, NoMemoryThatIsPinnedIsNeeded) {
  const cuda::Plugin& plugin = FakeCuda::plugin();
  FakeCuda& fake = FakeCuda::state();
  fake.pinnable = 0;
  const dsfp4::testing::Warnings warnings;
  CudaDevice device(plugin, FakeCuda::kIndex, 0);
  EXPECT_EQ(fake.pin_calls, std::vector<std::string>{"refused 4194304"});
  EXPECT_EQ(warnings.with("refused to pin 4.2 MB of RAM").size(), 1u);
}

TEST(CudaDeviceFaults, SlotsThatGrowAreUnpinnedMovedAndPinnedAgain) {
  const cuda::Plugin& plugin = FakeCuda::plugin();
  FakeCuda& fake = FakeCuda::state();
  {
    CudaDevice device(plugin, FakeCuda::kIndex, 0);
    memory::SlotPool pool(2, 4096, "the test's slots", device.staging());
    pool.data(1)[0] = std::byte{7};
    pool.resize({false, true, false, false});
    EXPECT_EQ(pool.data(1)[0], std::byte{7});
    EXPECT_EQ(fake.pinned.at(pool.data(0)), 16384u);
    pool.resize({true});
    EXPECT_EQ(fake.pinned.at(pool.data(0)), 4096u);
  }
  using Calls = std::vector<std::string>;
  EXPECT_EQ(fake.pin_calls, (Calls{kRingPinned, "pin 8192", "unpin", "pin 16384", "unpin",
                                   "pin 4096", "unpin", "unpin"}));
}

class CudaSegments : public ::testing::Test {
 protected:
  // Says whether the body ran.
  bool run(std::int64_t part, std::int64_t position = 0, const std::function<void()>& body = {}) {
    SequenceRows row;
    row.rows = 1;
    row.position = position;
    bool ran = false;
    backend_.segment({part, {&id_, 1}, {&row, 1}}, [&] {
      ran = true;
      if (body) body();
    });
    return ran;
  }
  // Once as it is, once recorded, once replayed.
  void record(std::int64_t part) {
    EXPECT_TRUE(run(part));
    EXPECT_TRUE(run(part));
    EXPECT_FALSE(run(part));
  }
  template <typename Error = CudaError>
  void expect_refused(const std::function<void()>& body) {
    const std::int64_t part = next_part_++;
    const std::size_t graphs = fake_.graphs.size();
    EXPECT_TRUE(run(part));
    EXPECT_THROW(run(part, 0, body), Error);
    EXPECT_EQ(fake_.recordings, 0);
    EXPECT_EQ(fake_.graphs.size(), graphs);
    EXPECT_FALSE(backend_.device().capturing());
    record(part);
  }

  CudaBackend backend_{FakeCuda::plugin(), FakeCuda::kIndex, 0};
  FakeCuda& fake_ = FakeCuda::state();
  std::int32_t id_ = 0;
  std::int64_t next_part_ = 0;
};

TEST_F(CudaSegments, AreReplayedAsLongAsTheirPartRowsAndLengthStay) {
  record(0);
  EXPECT_EQ(fake_.recorded, 1);
  EXPECT_EQ(fake_.launches, 2);
  EXPECT_FALSE(run(0, 63));
  EXPECT_TRUE(run(0, 64));  // looks at 65 tokens
  EXPECT_TRUE(run(0, 100));
  EXPECT_FALSE(run(0, 127));
  EXPECT_TRUE(run(1));
  EXPECT_FALSE(run(0));
  EXPECT_EQ(fake_.recorded, 2);
  SequenceRows rows;
  rows.rows = 2;
  bool ran = false;
  backend_.segment({0, {}, {&rows, 1}}, [&] { ran = true; });
  EXPECT_TRUE(ran);
}

TEST_F(CudaSegments, UploadWhatHasChanged) {
  WeightView table;
  table.rows = 10;
  const auto embed = [&] { backend_.embed(table, {&id_, 1}, {}); };
  id_ = 3;
  EXPECT_TRUE(run(0, 5, embed));
  EXPECT_EQ(fake_.embedded, 3);
  const int uploads = fake_.uploads;
  EXPECT_TRUE(run(0, 5, embed));
  EXPECT_FALSE(run(0, 5, embed));
  embed();
  EXPECT_EQ(fake_.uploads, uploads);
  id_ = 4;
  EXPECT_FALSE(run(0, 5));
  EXPECT_EQ(fake_.uploads, uploads + 1);
  EXPECT_FALSE(run(0, 6));
  EXPECT_EQ(fake_.uploads, uploads + 2);
}

// Memory that lies elsewhere now: what was recorded does not know it, and nothing lies there yet.
TEST_F(CudaSegments, AreRecordedAnewWhereMemoryHasMoved) {
  WeightView table;
  table.rows = 10;
  id_ = 3;
  const auto embed = [&] { backend_.embed(table, {&id_, 1}, {}); };
  record(0);
  const std::vector<std::int32_t> many(100'000, 3);
  backend_.embed(table, many, {});
  EXPECT_TRUE(run(0, 0, embed));
  EXPECT_TRUE(fake_.graphs.empty());
  EXPECT_EQ(fake_.embedded, 3);
  EXPECT_TRUE(run(0, 0, embed));
  EXPECT_FALSE(run(0, 0, embed));
  EXPECT_EQ(fake_.recorded, 2);
  EXPECT_EQ(fake_.graphs.size(), 1u);
  const int uploads = fake_.uploads;
  embed();
  EXPECT_EQ(fake_.uploads, uploads);
}

TEST_F(CudaSegments, UploadAgainWhereMemoryHasMoved) {
  WeightView table;
  table.rows = 10;
  id_ = 3;
  record(0);
  Ops::Largest largest;
  largest.rows = 100'000;
  backend_.reserve(largest);
  const auto embed = [&] { backend_.embed(table, {&id_, 1}, {}); };
  EXPECT_TRUE(run(0, 0, embed));
  EXPECT_EQ(fake_.embedded, 3);
  EXPECT_TRUE(run(0, 0, embed));
  EXPECT_FALSE(run(0, 0, embed));
}

TEST_F(CudaSegments, OfMoreThanAreKeptTheOneThatRanLongestAgoGoes) {
  constexpr auto kMost = static_cast<std::int64_t>(CudaBackend::kMostRecordings);
  for (std::int64_t part = 0; part < kMost; ++part) record(part);
  EXPECT_EQ(fake_.graphs.size(), CudaBackend::kMostRecordings);
  EXPECT_FALSE(run(0));
  EXPECT_TRUE(run(kMost));  // takes the place of part 1
  EXPECT_EQ(fake_.graphs.size(), CudaBackend::kMostRecordings - 1);
  EXPECT_TRUE(run(kMost));
  EXPECT_EQ(fake_.graphs.size(), CudaBackend::kMostRecordings);
  EXPECT_FALSE(run(kMost));
  EXPECT_FALSE(run(0));
  EXPECT_FALSE(run(2));
  EXPECT_TRUE(run(1));
  EXPECT_EQ(fake_.graphs.size(), CudaBackend::kMostRecordings - 1);
}

TEST_F(CudaSegments, AreGivenUpWhereTheBodyThrows) {
  expect_refused<std::out_of_range>([] { throw std::out_of_range("a body"); });
}

TEST_F(CudaSegments, ThatFailTheFirstTimeRunAsTheyAreAgain) {
  const auto fail = [] { throw std::out_of_range("a body"); };
  EXPECT_THROW(run(0, 0, fail), std::out_of_range);
  EXPECT_THROW(run(0, 0, fail), std::out_of_range);
  EXPECT_EQ(fake_.recorded, 0);
  record(0);
}

TEST_F(CudaSegments, DoNotNest) {
  EXPECT_THROW(run(0, 0, [&] { run(1); }), std::logic_error);
  record(0);
  record(1);
}

TEST_F(CudaSegments, RefuseTasks) {
  expect_refused([&] {
    const ExpertView expert;
    const std::int32_t pair = 0;
    const ExpertTask task{&expert, {&pair, 1}};
    backend_.experts({&task, 1}, 1, {}, {}, {}, Phase::kDecode);
  });
  expect_refused([&] {
    const ExpertView expert;
    const std::int32_t pair = 0;
    const ExpertTask task{&expert, {&pair, 1}};
    const Matrix row{nullptr, 1, 4, 4};
    backend_.add_experts({&task, 1}, {}, 1, row, row, row, row, Phase::kPrefill);
  });
}

TEST_F(CudaSegments, RefuseForcedExperts) {
  expect_refused([&] {
    RouterSpec spec;
    spec.experts = 4;
    spec.top_k = 1;
    const ConstMatrix logits{nullptr, 1, 4, 4};
    const std::int32_t forced = 2;
    backend_.route(spec, logits, {}, {&forced, 1}, {});
  });
}

TEST_F(CudaSegments, RefuseWhatWaitsOrCopies) {
  std::int32_t value = 0;
  CudaDevice& device = backend_.device();
  const Event event = device.make_event();
  expect_refused([&] { backend_.sample({}, {}); });
  expect_refused([&] { device.upload(&value, &value, sizeof(value)); });
  expect_refused([&] { device.download(&value, &value, sizeof(value)); });
  expect_refused([&] { device.copy_in(Queue::kCompute, &value, &value, sizeof(value)); });
  expect_refused([&] { device.copy_out(Queue::kCompute, &value, &value, sizeof(value)); });
  expect_refused([&] { device.wait(Queue::kCompute, event); });
  expect_refused([&] { device.wait_for(event); });
  expect_refused([&] { device.time_of(event); });
  expect_refused([&] { device.synchronize(); });
}

TEST_F(CudaSegments, RefuseWhatTheyDoNotName) {
  WeightView table;
  table.rows = 10;
  expect_refused([&] {
    const std::int32_t other = id_ + 1;
    backend_.embed(table, {&other, 1}, {});
  });
  expect_refused([&] {
    const SequenceRows other{0, 1, 7, {}};
    backend_.kv_append({&other, 1}, {});
  });
}

// Work that another thread asks of the queue of the ops comes after the recording, not into it.
TEST_F(CudaSegments, AreNotForOtherThreads) {
  CudaDevice& device = backend_.device();
  const Event event = device.make_event();
  std::thread other;
  EXPECT_TRUE(run(0));
  EXPECT_TRUE(run(0, 0, [&] {
    other = std::thread([&] {
      EXPECT_FALSE(device.capturing());
      device.record(Queue::kUpload, event);
      device.record(Queue::kCompute, event);
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }));
  other.join();
  EXPECT_EQ(fake_.events_recorded, 1);
  EXPECT_EQ(fake_.caught_in_capture, 0);
}

}  // namespace
}  // namespace dsfp4::ops
