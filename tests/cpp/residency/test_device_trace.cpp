// A device's spans: on the host's clock, in the order of their queue, and never waited for.
#include <chrono>
#include <filesystem>
#include <functional>
#include <string>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "base/files.h"
#include "dsfp4/error.h"
#include "dsfp4/log.h"
#include "residency/device_experts_fixture.h"
#include "residency/device_trace.h"

namespace dsfp4::residency {
namespace {

using std::chrono::milliseconds;
using Clock = Trace::Clock;

class DeviceTraceTest : public DeviceExpertsTest {
 protected:
  struct Span {
    std::string name;
    std::int64_t start, end;  // microseconds since the trace began
    std::uint64_t bytes;
  };
  static constexpr int kCopies = 4;  // the track's number
  static constexpr int kOps = 5;

  ~DeviceTraceTest() override {
    device_trace.reset();
    trace.reset();
    std::filesystem::remove(path);
  }
  void make_trace(std::size_t spans = DeviceTrace::kSpans) {
    before = Clock::now();
    trace.emplace(path);
    after = Clock::now();
    device_trace.emplace(*trace, device, DeviceTrace::Experts{.first_layer = 2, .per_layer = 4},
                         spans);
  }
  // Ends the trace.
  std::vector<Span> spans_of(int track) {
    device_trace.reset();
    trace.reset();
    std::vector<Span> spans;
    for (const auto& event : nlohmann::json::parse(read_whole_file(path))) {
      if (event.at("ph") != "X" || event.at("tid") != track) continue;
      const std::int64_t start = event.at("ts");
      const std::uint64_t bytes =
          event.contains("args") ? std::uint64_t(event["args"]["bytes"]) : 0;
      spans.push_back({event.at("name"), start, start + std::int64_t(event.at("dur")), bytes});
    }
    return spans;
  }
  // Microseconds since the trace began: at least, and at most.
  std::int64_t least_now() const { return microseconds_since(after); }
  std::int64_t most_now() const { return microseconds_since(before); }
  static std::int64_t microseconds_since(Clock::time_point start) {
    return std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - start).count();
  }

  std::filesystem::path path = std::filesystem::path(testing::TempDir()) /
                               ("device_trace." + std::to_string(::getpid()) + ".json");
  std::optional<Trace> trace;
  Clock::time_point before, after;  // the trace began
  std::optional<DeviceTrace> device_trace;
};

TEST_F(DeviceTraceTest, CopiesLieBetweenTheirQueueingAndTheirEnd) {
  make_trace();
  make_on(device, 4, 0, &*device_trace);
  device.delay_copies(ops::Queue::kUpload, milliseconds(3));
  std::vector<std::int64_t> queued, ended;
  for (const ExpertKey key : {6u, 1u, 9u}) {
    queued.push_back(least_now());
    bring(key, false);
    experts->wait_copied(key);
    ended.push_back(most_now());
    release(key);
  }
  const std::vector<Span> spans = spans_of(kCopies);
  ASSERT_EQ(spans.size(), 3u);
  EXPECT_EQ(spans[0].name, "layer 3 expert 2");
  EXPECT_EQ(spans[1].name, "layer 2 expert 1");
  EXPECT_EQ(spans[2].name, "layer 4 expert 1");
  for (std::size_t i = 0; i < spans.size(); ++i) {
    EXPECT_EQ(spans[i].bytes, experts->stats().brought_bytes / 3);
    EXPECT_GE(spans[i].start, queued[i]);
    EXPECT_GE(spans[i].end - spans[i].start, 6 * 3000 - 1);  // three matrices and their scales
    EXPECT_LE(spans[i].end, ended[i]);
    if (i > 0) {
      EXPECT_GE(spans[i].start, spans[i - 1].end);
    }
  }
}

// A copy begins when its slot is free, not when it is queued.
TEST_F(DeviceTraceTest, ASpanBeginsWhenItsQueueHasComeToIt) {
  make_trace();
  make_on(device, 1, 0, &*device_trace);
  pass(0, false);
  device.synchronize();
  device.hold(ops::Queue::kCompute);
  compute(*bring(1, false), 0);
  release(1);
  bring(2, false);  // into the slot that the held op has yet to read
  release(2);
  experts->wait_copied(1);
  const std::int64_t most = most_now();
  const std::int64_t held = least_now();
  std::this_thread::sleep_for(milliseconds(5));
  device_trace->poll();
  device.let_go(ops::Queue::kCompute);
  device.synchronize();
  const std::vector<Span> spans = spans_of(kCopies);
  ASSERT_EQ(spans.size(), 3u);
  EXPECT_LE(spans[1].end, most);
  EXPECT_GE(spans[2].start, held + 5000);
}

TEST_F(DeviceTraceTest, NobodyWaitsForSpansAndThoseTooManyAreLeftOut) {
  std::vector<std::string> said;
  set_log_callback([&](LogLevel, std::string_view message) { said.emplace_back(message); });
  make_trace(2);
  device.hold(ops::Queue::kCompute);
  const std::int64_t waits = device.counts().host_waits;
  for (int i = 0; i < 5; ++i) {
    device_trace->begin_ops();
    device_trace->end_ops("op " + std::to_string(i));
  }
  EXPECT_EQ(device.counts().host_waits, waits);
  device.run_empty();
  for (int i = 5; i < 8; ++i) {
    device_trace->begin_ops();
    device_trace->end_ops("op " + std::to_string(i));
    device.run_empty();
  }
  std::string names;
  for (const Span& span : spans_of(kOps)) names += span.name + " ";
  set_log_callback({});
  EXPECT_EQ(names, "op 0 op 1 op 5 op 6 op 7 ");
  ASSERT_EQ(said.size(), 1u);
  EXPECT_TRUE(said[0].starts_with("3 spans of the device are missing"));
}

TEST_F(DeviceTraceTest, ABeginWithoutAnEndIsForgotten) {
  make_trace();
  device_trace->begin_ops();
  device_trace->begin_ops();
  device_trace->end_ops("op");
  device_trace->end_ops("of no begin");
  device.run_empty();
  const std::vector<Span> spans = spans_of(kOps);
  ASSERT_EQ(spans.size(), 1u);
  EXPECT_EQ(spans[0].name, "op");
}

// Nobody knows what ran.
TEST_F(DeviceTraceTest, AnErrorOfTheDeviceEndsTheSpansUnderWay) {
  make_trace();
  device.hold(ops::Queue::kCompute);
  device.fail_op(1);
  device_trace->begin_ops();
  compute_ops.zero(results);
  device_trace->end_ops("fails");
  device.run_empty();
  EXPECT_THROW(device_trace->poll(), CudaError);
  device.clear_error();
  device_trace->begin_ops();
  device_trace->end_ops("works");
  device.run_empty();
  const std::vector<Span> spans = spans_of(kOps);
  ASSERT_EQ(spans.size(), 1u);
  EXPECT_EQ(spans[0].name, "works");
}

TEST_F(DeviceTraceTest, ThereIsNoneWithoutATraceOrADevice) {
  EXPECT_EQ(DeviceTrace::make(nullptr, device, {}), nullptr);
  trace.emplace(path);
  EXPECT_EQ(DeviceTrace::make(&*trace, ops::host_device(), {}), nullptr);
  EXPECT_EQ(device.counts().timed_events, 0);
  EXPECT_NE(DeviceTrace::make(&*trace, device, {}), nullptr);
  EXPECT_EQ(device.counts().timed_events, 0);  // all are given back
}

}  // namespace
}  // namespace dsfp4::residency
