// Experts in the memory of an emulated device: what ops read there, which stay, and who waits for
// whom.
#include <array>
#include <chrono>
#include <cstdint>
#include <stdexcept>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "residency/device_experts_fixture.h"

namespace dsfp4::residency {
namespace {

using format::WeightFormat;
using ops::HostExpertView;
using ops::Queue;

// ---- bytes

TEST_F(DeviceExpertsTest, OpsReadTheExpertThatWasBrought) {
  for (const WeightFormat format : ops::testing::kAllFormats) {
    use_format(format);
    make(2, 1);
    const std::int64_t copies = device.counts().copies_in(Queue::kUpload);
    const std::int64_t bytes = device.counts().bytes_in(Queue::kUpload);
    for (ExpertKey key = 0; key < 6; ++key) {
      const ops::ExpertView* view = bring(key, key == 0);
      ASSERT_NE(view, nullptr);
      EXPECT_EQ(view->down_proj.global_scale, source[key].down_proj.global_scale);
      compute(*view, key);
      release(key);
    }
    const ops::ExpertView* cached = experts->find(0);
    ASSERT_NE(cached, nullptr);
    compute(*cached, 6);
    release(0);
    for (ExpertKey key = 0; key < 6; ++key) EXPECT_EQ(result(key), expected[key]);
    EXPECT_EQ(result(6), expected[0]);
    const bool has_scales = source[0].gate_proj.scales != nullptr;
    EXPECT_EQ(cached->gate_proj.scales == nullptr, !has_scales);
    EXPECT_EQ(device.counts().copies_in(Queue::kUpload) - copies, has_scales ? 36 : 18);
    const DeviceStats& stats = experts->stats();
    EXPECT_EQ(stats.brought, 6u);
    EXPECT_EQ(static_cast<std::int64_t>(stats.brought_bytes),
              device.counts().bytes_in(Queue::kUpload) - bytes);
    EXPECT_EQ(stats.hits, 1u);
    EXPECT_EQ(stats.evictions, 0u);
  }
}

TEST_F(DeviceExpertsTest, MatricesBeginOnABoundary) {
  using format::data_bytes;
  const std::size_t before = device.memory().used();
  make(3, 1);
  const std::size_t slot = DeviceExperts::slot_bytes(source[0]);
  EXPECT_EQ(slot, 3 * (1024u + 256u));  // 64 x 32 values of 4 bits, 128 scales of a byte
  EXPECT_EQ(device.memory().used() - before, 3 * slot);
  const ops::ExpertView& view = *bring(4, true);
  EXPECT_EQ(view.gate_proj.scales - view.gate_proj.data, 1024);
  EXPECT_EQ(view.up_proj.data - view.gate_proj.data, 1280);
  EXPECT_EQ(view.down_proj.data - view.gate_proj.data, 2560);
  EXPECT_EQ(bring(5, false)->gate_proj.data - view.gate_proj.data,
            static_cast<std::ptrdiff_t>(slot));
}

TEST_F(DeviceExpertsTest, LargerExpertsAndMisuseAreErrors) {
  make(2, 1);
  const auto refused = [&](auto change) {
    HostExpertView other = source[3];
    change(other);
    EXPECT_THROW(experts->bring(3, other, true), std::logic_error);
    EXPECT_FALSE(experts->has(3));
    EXPECT_TRUE(experts->is_consistent());
  };
  refused([](HostExpertView& e) { e.down_proj.rows *= 2; });
  refused([](HostExpertView& e) { e.up_proj.cols *= 2; });
  refused([](HostExpertView& e) { e.gate_proj.format = WeightFormat::kBF16; });
  pass(3, true);
  EXPECT_THROW(experts->bring(3, source[3], true), std::logic_error);
  EXPECT_THROW(experts->release(3), std::logic_error);
  EXPECT_THROW(experts->release(4), std::logic_error);
  EXPECT_THROW(experts->find(kExperts), std::out_of_range);
  EXPECT_THROW(experts->bring(kExperts, source[3], true), std::out_of_range);
  EXPECT_THROW(make(2, 2), ParameterError);
  EXPECT_THROW(make(0, 0), ParameterError);
}

// ---- order

TEST_F(DeviceExpertsTest, ASlotKeepsItsBytesUntilItsReadersRan) {
  make(1, 0);
  const ops::ExpertView* view = bring(0, false);
  experts->wait_copied(0);
  device.hold(Queue::kCompute);
  compute(*view, 0);
  release(0);
  view = bring(1, false);
  ASSERT_NE(view, nullptr);
  compute(*view, 1);
  EXPECT_TRUE(stays([&] { return !experts->copied(1); }));
  device.let_go(Queue::kCompute);
  EXPECT_EQ(result(0), expected[0]);
  EXPECT_EQ(result(1), expected[1]);
}

TEST_F(DeviceExpertsTest, TheLastOfSeveralReadersCounts) {
  make(1, 0);
  const ops::ExpertView* view = bring(0, false);
  EXPECT_EQ(experts->find(0), view);
  experts->wait_copied(0);
  compute(*view, 0);
  release(0);
  EXPECT_EQ(bring(1, false), nullptr);
  device.hold(Queue::kCompute);
  compute(*view, 1);
  release(0);
  EXPECT_FALSE(experts->has(0));
  compute(*bring(1, false), 2);
  EXPECT_TRUE(stays([&] { return !experts->copied(1); }));
  device.let_go(Queue::kCompute);
  EXPECT_EQ(result(1), expected[0]);
  EXPECT_EQ(result(2), expected[1]);
}

TEST_F(DeviceExpertsTest, AnEvictedExpertsReadersRunFirst) {
  make(2, 1);
  const ops::ExpertView* view = bring(0, true);
  experts->wait_copied(0);
  device.hold(Queue::kCompute);
  compute(*view, 0);
  release(0);
  worth[1] = 1.0f;
  ASSERT_NE(bring(2, false), nullptr);
  view = bring(1, true);  // where the evicted one lies
  compute(*view, 1);
  EXPECT_TRUE(stays([&] { return !experts->copied(1); }));
  EXPECT_TRUE(experts->copied(2));
  device.let_go(Queue::kCompute);
  EXPECT_EQ(result(0), expected[0]);
  EXPECT_EQ(result(1), expected[1]);
}

TEST_F(DeviceExpertsTest, OpsWaitForTheCopies) {
  make(3, 2);
  device.hold(Queue::kUpload);
  const std::int64_t done = device.counts().ops;
  compute(*bring(0, true), 0);
  compute(*bring(1, true), 1);
  EXPECT_TRUE(stays([&] { return device.counts().ops == done; }));
  device.let_go(Queue::kUpload);
  EXPECT_EQ(result(0), expected[0]);
  EXPECT_EQ(result(1), expected[1]);

  device.delay_copies(Queue::kUpload, std::chrono::milliseconds(5));
  compute(*bring(2, false), 2);
  EXPECT_EQ(result(2), expected[2]);
}

TEST_F(DeviceExpertsTest, TheSlotThatWasReleasedFirstIsFilledFirst) {
  make(3, 0);
  std::array<DevicePtr<const std::byte>, 3> places;
  for (ExpertKey key = 0; key < 3; ++key) places[key] = bring(key, false)->gate_proj.data;
  release(1);
  release(2);
  release(0);
  EXPECT_EQ(bring(3, false)->gate_proj.data, places[1]);
  EXPECT_EQ(bring(4, false)->gate_proj.data, places[2]);
  EXPECT_EQ(bring(5, false)->gate_proj.data, places[0]);
}

TEST_F(DeviceExpertsTest, NothingHereWaitsOnTheHost) {
  make(3, 1);
  device.hold(Queue::kCompute);
  device.hold(Queue::kUpload);
  for (ExpertKey key = 0; key < kExperts; ++key) {
    worth[key] = static_cast<float>(key);
    const std::int64_t waits = device.counts().host_waits;
    compute(*bring(key, key % 2 == 0), key);
    release(key);
    EXPECT_EQ(device.counts().host_waits, waits);
  }
  device.let_go(Queue::kCompute);
  device.let_go(Queue::kUpload);
  for (ExpertKey key = 0; key < kExperts; ++key) EXPECT_EQ(result(key), expected[key]);
}

// ---- which experts stay

TEST_F(DeviceExpertsTest, TheLeastWorthGoes) {
  worth = {3.0f, 1.0f, 2.0f, 1.5f, 0.5f, 1.5f};
  make(4, 3);
  for (ExpertKey key = 0; key < 3; ++key) pass(key, true);
  EXPECT_EQ(experts->cache_room(), 0u);
  pass(3, true);  // in place of 1
  EXPECT_FALSE(experts->has(1));
  pass(4, true);  // is worth less than all
  EXPECT_FALSE(experts->has(4));
  pass(5, true);  // and this as much as the least
  EXPECT_FALSE(experts->has(5));
  for (const ExpertKey key : {0, 2, 3}) EXPECT_TRUE(experts->has(key));
  EXPECT_EQ(experts->stats().evictions, 1u);

  worth[4] = 9.0f;
  ASSERT_NE(experts->find(3), nullptr);  // a pinned one stays
  pass(4, true);
  EXPECT_TRUE(experts->has(3));
  EXPECT_FALSE(experts->has(2));
  release(3);
  EXPECT_EQ(experts->stats().evictions, 2u);
  EXPECT_EQ(experts->stats().hits, 1u);
}

TEST_F(DeviceExpertsTest, AnExpertGoesBackWhole) {
  for (const WeightFormat format : ops::testing::kAllFormats) {
    use_format(format);
    make(2, 1);
    worth[1] = 1.0f;
    pass(0, true);
    experts->wait_copied(0);
    ASSERT_EQ(experts->victim(1), std::optional<ExpertKey>(0));
    EXPECT_EQ(experts->victim(2), std::nullopt);  // is worth no more
    const HostExpertView& from = source[0];
    const ExpertBytes to = {blank(from.gate_proj), blank(from.up_proj), blank(from.down_proj)};
    device.hold(Queue::kDownload);
    ASSERT_TRUE(experts->can_send_back(0));
    experts->send_back(0, to);
    EXPECT_FALSE(experts->has(0));
    EXPECT_TRUE(experts->is_consistent());
    // Another expert takes the other slot, and a third has none until the first has left.
    ASSERT_NE(bring(1, true), nullptr);
    EXPECT_EQ(bring(2, false), nullptr);
    EXPECT_EQ(experts->sent_back(), std::nullopt);
    EXPECT_THROW(experts->resize(4, 2), std::logic_error);
    device.let_go(Queue::kDownload);
    experts->wait_sent_back();
    EXPECT_EQ(experts->sent_back(), std::optional<ExpertKey>(0));
    EXPECT_EQ(experts->sent_back(), std::nullopt);
    EXPECT_NE(bring(2, false), nullptr);
    for (const auto& [a, b] : {std::pair(from.gate_proj, format::WeightView(to.gate_proj)),
                               std::pair(from.up_proj, format::WeightView(to.up_proj)),
                               std::pair(from.down_proj, format::WeightView(to.down_proj))}) {
      EXPECT_EQ(data_of(a), data_of(b));
      EXPECT_EQ(scales_of(a), scales_of(b));
    }
    EXPECT_EQ(experts->stats().sent_back, 1u);
    release(1);
    release(2);
  }
}

TEST_F(DeviceExpertsTest, OnlyOneThatIsWholeAndUnusedGoesBackAndNotTooManyAtOnce) {
  make(6, 5);
  device.hold(Queue::kUpload);
  ASSERT_NE(bring(0, true), nullptr);
  EXPECT_FALSE(experts->can_send_back(0));  // pinned
  release(0);
  EXPECT_FALSE(experts->can_send_back(0));  // not there yet
  device.let_go(Queue::kUpload);
  for (ExpertKey key = 1; key < 4; ++key) pass(key, true);
  experts->wait_copied(3);
  device.hold(Queue::kDownload);
  const HostExpertView& from = source[0];
  const ExpertBytes to = {blank(from.gate_proj), blank(from.up_proj), blank(from.down_proj)};
  experts->send_back(0, to);
  experts->send_back(1, to);
  EXPECT_FALSE(experts->can_send_back(2));
  EXPECT_THROW(experts->send_back(2, to), std::logic_error);
  EXPECT_EQ(experts->drop_leaving(), std::optional<ExpertKey>(0));
  EXPECT_EQ(experts->drop_leaving(), std::optional<ExpertKey>(1));
  EXPECT_EQ(experts->drop_leaving(), std::nullopt);
  EXPECT_TRUE(experts->is_consistent());
}

TEST_F(DeviceExpertsTest, NoMoreThanCacheSlotsStay) {
  make(6, 2);
  for (ExpertKey key = 0; key < 5; ++key) ASSERT_NE(bring(key, true), nullptr);
  EXPECT_EQ(experts->cached(), 2u);  // those are pinned, so nothing takes their place
  for (ExpertKey key = 0; key < 5; ++key) release(key);
  for (ExpertKey key = 0; key < 5; ++key) EXPECT_EQ(experts->has(key), key < 2);
  EXPECT_EQ(experts->find(2), nullptr);
  EXPECT_EQ(experts->cached(), 2u);

  make(2, 0);
  pass(0, true);
  EXPECT_FALSE(experts->has(0));
}

TEST_F(DeviceExpertsTest, PinnedSlotsAndCachedOnesAreNotForPassing) {
  worth[5] = 1.0f;
  make(3, 1);
  pass(0, true);
  ASSERT_NE(bring(1, false), nullptr);
  ASSERT_NE(bring(2, false), nullptr);
  EXPECT_EQ(bring(3, false), nullptr);
  EXPECT_EQ(bring(3, true), nullptr);  // is worth no more than what is cached
  EXPECT_TRUE(experts->has(0));
  ASSERT_NE(bring(5, true), nullptr);
  EXPECT_FALSE(experts->has(0));
  EXPECT_EQ(bring(3, true), nullptr);
  const std::uint64_t brought = experts->stats().brought;
  EXPECT_EQ(brought, 4u);
  release(1);
  EXPECT_NE(bring(3, false), nullptr);
}

// ---- the source of copies

TEST_F(DeviceExpertsTest, CopiedSaysWhenTheSourceMayGo) {
  make(2, 1);
  EXPECT_TRUE(experts->copied(0));  // never brought
  experts->wait_copied(0);
  device.hold(Queue::kUpload);
  ASSERT_NE(bring(0, true), nullptr);
  pass(1, false);
  EXPECT_FALSE(experts->copied(0));
  EXPECT_FALSE(experts->copied(1));
  EXPECT_TRUE(experts->copied(2));
  device.let_go(Queue::kUpload);
  experts->wait_copied(1);
  EXPECT_TRUE(experts->copied(0));  // copies are made in order
  EXPECT_TRUE(experts->copied(1));
}

TEST_F(DeviceExpertsTest, CopiesOfGivenUpExpertsAreWaitedForOnTheirOwn) {
  make(2, 0);
  pass(0, false);
  experts->wait_copied(0);
  pass(1, false);
  pass(0, false);
  experts->wait_copied(1);
  device.hold(Queue::kUpload);
  pass(2, false);
  EXPECT_TRUE(experts->copied(1));
  EXPECT_FALSE(experts->copied(2));
  device.let_go(Queue::kUpload);
  for (int i = 0; i < 600; ++i) pass(static_cast<ExpertKey>(3 + i % 8), false);
  experts->wait_copied(2);
  for (ExpertKey key = 3; key < 11; ++key) experts->wait_copied(key);
  EXPECT_TRUE(experts->copied(2));
}
}  // namespace
}  // namespace dsfp4::residency
