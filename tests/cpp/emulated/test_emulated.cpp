// The emulated device against what it promises: without that, tests that use it prove nothing.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "emulated/fixture.h"

namespace dsfp4::ops::testing {
namespace {

using format::WeightFormat;
using std::chrono::milliseconds;

template <typename Call>
std::string logic_error_of(Call call) {
  try {
    call();
  } catch (const std::logic_error& error) {
    return error.what();
  }
  return "no error";
}

// ---- memory

class EmulatedDeathTest : public EmulatedFixture {};
class Emulated : public EmulatedFixture {};

TEST_F(EmulatedDeathTest, TheHostCannotReadItsMemory) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");  // there are the queues' threads
  EXPECT_FALSE(device.host_visible());
  EXPECT_THROW(device.on_host(slot.data), std::logic_error);
  EXPECT_DEATH(static_cast<void>(*static_cast<const volatile float*>(unwrap(slot.data))), "");
}

TEST_F(Emulated, NewMemoryIsPoisoned) {
  EXPECT_TRUE(all_nan(room.get(slot)));
  std::vector<std::byte*> blocks;
  for (int i = 0; i < 16; ++i) {  // until addresses come again
    std::byte* block = device.memory().allocate(std::size_t{32} << 20);
    ASSERT_NE(block, nullptr);
    const Matrix there{reinterpret_cast<float*>(block), 1, 8, 8};
    EXPECT_TRUE(all_nan(room.get(there)));
    ops.zero(there);
    device.synchronize();
    device.memory().release(block, std::size_t{32} << 20);
    blocks.push_back(block);
  }
  EXPECT_NE(blocks[0], blocks[1]);
  EXPECT_NE(std::ranges::find(blocks.begin() + 1, blocks.end(), blocks[0]), blocks.end());
}

TEST_F(Emulated, OpsOnOtherMemoryAreErrorsThatNameThem) {
  std::vector<float> on_host(8);
  ops.add(slot, Matrix{on_host.data(), 1, 8, 8});
  ops.zero(slot);  // is left out
  EXPECT_NE(logic_error_of([&] { device.synchronize(); }).find("add: 32 bytes at"),
            std::string::npos);
  device.clear_error();
  EXPECT_TRUE(all_nan(room.get(slot)));

  std::byte* block = device.memory().allocate(32);
  const Matrix there{reinterpret_cast<float*>(block), 1, 8, 8};
  ops.zero(there);
  ops.zero({there.data, 1, 9, 9});
  EXPECT_NE(logic_error_of([&] { device.synchronize(); }).find("zero: 36"), std::string::npos);
  device.clear_error();
  device.hold(Queue::kCompute);
  ops.silu_mul(there, there);
  device.memory().release(block, 32);
  device.let_go(Queue::kCompute);
  EXPECT_NE(logic_error_of([&] { room.get(slot); }).find("silu_mul"), std::string::npos);
  device.clear_error();
  EXPECT_EQ(device.counts().ops, 1);
}

TEST_F(Emulated, CopiesToOtherMemoryAreErrors) {
  const float* from = staged(values);
  EXPECT_THROW(copy_in(values.data(), slot), std::logic_error);
  EXPECT_THROW(device.copy_out(Queue::kDownload, slot.data, nullptr, 4), std::logic_error);
  device.synchronize();
  copy_in(from, {nullptr, 1, 8, 8});
  EXPECT_THROW(device.synchronize(), std::logic_error);
  device.clear_error();
  {
    memory::Arena other(32, "the test's copies", device.staging());
    device.hold(Queue::kUpload);
    copy_in(memory::on_host(device.staging(), other.take_array<float>(8)), slot);
  }
  device.let_go(Queue::kUpload);
  EXPECT_THROW(device.synchronize(), std::logic_error);
}

TEST(EmulatedLimits, MemoryAndStagingEndWhereTheyShould) {
  EmulatedDevice device({.memory_limit = 10000, .staging_limit = 5000});
  for (memory::MemorySource* source : {static_cast<memory::MemorySource*>(&device.memory()),
                                       static_cast<memory::MemorySource*>(&device.staging())}) {
    const std::size_t all = source->available();
    EXPECT_EQ(source->allocate(all + 1), nullptr);
    std::byte* part = source->allocate(all - 100);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(part) % 4096, 0u);
    EXPECT_EQ(source->available(), 100u);
    EXPECT_EQ(source->allocate(101), nullptr);
    std::byte* rest = source->allocate(100);
    EXPECT_NE(rest, nullptr);
    source->release(part, all - 100);
    source->release(rest, 100);
    EXPECT_EQ(source->available(), all);
  }
  EXPECT_STREQ(device.memory().name(), "VRAM");
  EXPECT_THROW(memory::Arena(10001, "the weights", device.memory()), MemoryLimitError);
  device.staging().set_limit(10);
  EXPECT_EQ(device.staging().allocate(11), nullptr);
  device.memory().fail_allocation(2);
  std::byte* first = device.memory().allocate(1);
  EXPECT_NE(first, nullptr);
  EXPECT_EQ(device.memory().allocate(1), nullptr);
  device.memory().release(first, 1);
}

// ---- queues

TEST_F(Emulated, WithoutAnEventAnOpDoesNotWaitForTheUpload) {
  const float* from = staged(values);
  ops.zero(out);
  device.hold(Queue::kUpload);
  copy_in(from, slot);
  ops.add(slot, out);
  EXPECT_TRUE(all_nan(room.get(out)));
  device.let_go(Queue::kUpload);
  device.synchronize();
  EXPECT_EQ(room.get(slot), values);
}

TEST_F(Emulated, WithAnEventItDoes) {
  const float* from = staged(values);
  const Event uploaded = device.make_event();
  ops.zero(out);
  device.delay_copy(Queue::kUpload, 1, milliseconds(20));
  copy_in(from, slot);
  device.record(Queue::kUpload, uploaded);
  device.wait(Queue::kCompute, uploaded);
  ops.add(slot, out);
  EXPECT_EQ(room.get(out), values);
  EXPECT_TRUE(device.passed(uploaded));
}

TEST_F(Emulated, EventsOrderAllThreeQueues) {
  float* from = staged(values);
  float* to = staged(std::vector<float>(8));
  const Event uploaded = device.make_event();
  const Event computed = device.make_event();
  const Event downloaded = device.make_event();
  device.delay_copies(Queue::kUpload, milliseconds(5));
  device.delay_copies(Queue::kDownload, milliseconds(5));
  std::vector<float> expected = values;
  for (int round = 0; round < 3; ++round) {
    device.wait(Queue::kUpload, downloaded);  // passed in the first round
    copy_in(from, slot);
    device.record(Queue::kUpload, uploaded);
    device.wait(Queue::kCompute, uploaded);
    ops.add(slot, slot);
    device.record(Queue::kCompute, computed);
    device.wait(Queue::kDownload, computed);
    device.copy_out(Queue::kDownload, slot.data, to, 32);
    device.record(Queue::kDownload, downloaded);
    device.wait_for(downloaded);
    expected = doubled(expected);
    EXPECT_EQ(std::vector<float>(to, to + 8), expected);
    std::ranges::copy(expected, from);
  }
  const EmulatedCounts counts = device.counts();
  EXPECT_EQ(counts.ops, 3);
  EXPECT_EQ(counts.copies_in(Queue::kUpload), 3);
  EXPECT_EQ(counts.bytes_in(Queue::kDownload), 96);
  EXPECT_EQ(counts.host_waits, 3);
}

TEST_F(Emulated, AnEventStandsForTheMomentItWasRecorded) {
  const Event event = device.make_event();
  EXPECT_TRUE(device.passed(event));
  device.wait_for(event);
  device.wait_for(Event());
  EXPECT_TRUE(device.passed(Event()));
  EXPECT_THROW(device.record(Queue::kUpload, Event()), std::logic_error);

  device.record(Queue::kDownload, event);
  device.wait(Queue::kCompute, event);
  device.hold(Queue::kUpload);
  device.record(Queue::kUpload, event);  // the wait is for what it was before
  ops.zero(out);
  EXPECT_EQ(room.get(out), std::vector<float>(8, 0.0f));
  EXPECT_FALSE(device.passed(event));
  device.let_go(Queue::kUpload);
  device.wait_for(event);
  EXPECT_TRUE(device.passed(event));
}

TEST_F(Emulated, OnlyTimedEventsThatHavePassedHaveATime) {
  const Event plain = device.make_event();
  const Event timed = device.make_timed_event();
  EXPECT_EQ(logic_error_of([&] { device.time_of(timed); }),
            "time_of() an event that was never recorded");
  device.hold(Queue::kUpload);
  device.record(Queue::kUpload, timed);
  EXPECT_EQ(logic_error_of([&] { device.time_of(timed); }),
            "time_of() an event that has not passed");
  const auto held = Device::Clock::now();
  device.let_go(Queue::kUpload);
  device.wait_for(timed);
  EXPECT_GE(device.time_of(timed), held);
  EXPECT_LE(device.time_of(timed), Device::Clock::now());
  device.record(Queue::kUpload, plain);
  device.wait_for(plain);
  EXPECT_EQ(logic_error_of([&] { device.time_of(plain); }), "the event is not timed");
}

TEST_F(Emulated, AnEventMayGoWhileQueuesWaitForIt) {
  {
    const Event event = device.make_event();
    device.hold(Queue::kUpload);
    device.record(Queue::kUpload, event);
    device.wait(Queue::kCompute, event);
    ops.zero(out);
  }
  device.let_go(Queue::kUpload);
  EXPECT_EQ(room.get(out), std::vector<float>(8, 0.0f));
}

TEST(EmulatedSpeed, SlowCopiesArriveInOrder) {
  EmulatedDevice slow({.copy_bytes_per_second = 1e4});
  Room there(slow, 1024);
  memory::Arena here(1024, "the test's copies", slow.staging());
  const Matrix slot = there.matrix(1, 8);
  const Event copied = slow.make_event();
  float* staged = memory::on_host(slow.staging(), here.take_array<float>(16));
  std::ranges::copy(random_values(16, 1), staged);
  slow.copy_in(Queue::kUpload, staged, slot.data, 32);
  slow.copy_in(Queue::kUpload, staged + 8, slot.data, 32);
  slow.record(Queue::kUpload, copied);
  slow.wait(Queue::kCompute, copied);
  EXPECT_EQ(there.get(slot), std::vector<float>(staged + 8, staged + 16));
}

TEST_F(Emulated, WhatTheHostGaveAnOpIsTheCallersAgain) {
  std::vector<std::int32_t> ids{1, 2};
  const WeightView table = room.weight(WeightFormat::kF32, 4, 8, 3);
  const Matrix rows = room.matrix(2, 8);
  std::vector<float> upload = values;
  device.hold(Queue::kCompute);
  ops.embed(table, ids, rows);
  device.upload(upload.data(), slot.data, 32);
  ids.assign(2, 0);
  upload.assign(8, 0.0f);
  device.let_go(Queue::kCompute);
  const std::vector<float> random = random_values(32, 3);
  EXPECT_EQ(room.get(rows), std::vector<float>(random.begin() + 8, random.begin() + 24));
  EXPECT_EQ(room.get(slot), values);
  EXPECT_THROW(ops.embed(table, std::vector<std::int32_t>{4}, slot), ParameterError);
  EXPECT_EQ(ops.sample(slot, {}), std::nullopt);
}

// ---- failures

TEST_F(Emulated, FailuresSurfaceWhereTheHostWaitsAndStay) {
  const Event event = device.make_event();
  device.fail_op(2);
  ops.zero(out);
  ops.zero(slot);
  ops.add(out, slot);
  device.record(Queue::kCompute, event);
  EXPECT_THROW(device.wait_for(event), CudaError);
  EXPECT_THROW(device.passed(event), CudaError);
  EXPECT_THROW(device.synchronize(), CudaError);
  EXPECT_THROW(room.get(out), CudaError);
  ops.zero(slot);  // no op runs any more
  EXPECT_THROW(ops.sample(out, {}), CudaError);
  EXPECT_EQ(device.counts().ops, 1);
  device.clear_error();
  EXPECT_EQ(room.get(out), std::vector<float>(8, 0.0f));
  EXPECT_TRUE(all_nan(room.get(slot)));

  const float* from = staged(values);
  device.fail_copy(Queue::kUpload, 2);
  copy_in(from, out);
  copy_in(from, slot);
  EXPECT_THROW(device.synchronize(), CudaError);
  EXPECT_EQ(device.counts().copies_in(Queue::kUpload), 1);
  device.clear_error();
  EXPECT_EQ(room.get(out), values);
  EXPECT_TRUE(all_nan(room.get(slot)));
}

}  // namespace
}  // namespace dsfp4::ops::testing
