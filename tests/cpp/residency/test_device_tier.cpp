// Experts that are copied to VRAM before anybody asks, on the emulated device.
#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "emulated/emulated_ops.h"
#include "emulated/room.h"
#include "residency/device_tier.h"
#include "residency/tiny_experts.h"

namespace dsfp4::residency {
namespace {

using Keys = std::vector<ExpertKey>;

class DeviceTierTest : public TinyExpertsTest {
 protected:
  static constexpr double kFast = 1e15;  // bytes a second
  static constexpr double kSlow = 1.0;

  DeviceTierTest() {
    make_store(6, 5, device_.staging());
    experts_.emplace(device_, DeviceExperts::slot_bytes(views_[0]), 6, 2, views_.size(),
                     [this](std::span<const ExpertKey> keys, std::span<float> worth) {
                       store_->worth(keys, worth);
                     });
    tier_.emplace(compute_, *ops_, *experts_, *store_,
                  DeviceTier::Shape{kTopK, kHidden, kIntermediate});
    for (const ExpertKey key : {1u, 2u, 3u, 4u}) {
      bring(key);
      check(key);
    }
  }
  // As computing with it does.
  void check(ExpertKey key) {
    ASSERT_EQ(store_->pin(key, true), ExpertStore::Found::kReady);
    store_->check(std::span(&key, 1));
    store_->unpin(key);
  }
  void TearDown() override {
    device_.run_empty();
    tier_.reset();
    experts_.reset();
    EXPECT_TRUE(store_->is_consistent());
    store_.reset();
    reader_.reads.clear();  // they keep the slots
  }
  // The time between two layers is known from here on.
  void begin_with(double copies) {
    tier_->start_rates(copies, 1.0);
    tier_->copy_ahead({});
    tier_->reach_layer();
  }
  Keys in_vram() const {
    Keys keys;
    for (ExpertKey key = 0; key < views_.size(); ++key) {
      if (experts_->has(key)) keys.push_back(key);
    }
    return keys;
  }

  ops::testing::EmulatedOps compute_;
  ops::testing::EmulatedDevice& device_ = *compute_.emulated();
  ops::testing::Room room_{device_};
  std::optional<DeviceExperts> experts_;
  std::optional<DeviceTier> tier_;
};

TEST_F(DeviceTierTest, CopiesTheLikeliestThatLieInRamUntilTheLayerIsReached) {
  begin_with(kFast);
  EXPECT_TRUE(tier_->has_time_ahead());
  tier_->copy_ahead(Keys{9, 3, 1, 2});  // 9 is not in RAM
  EXPECT_EQ(in_vram(), (Keys{1, 3}));
  EXPECT_EQ(tier_->stats().copied_ahead, 2u);
  tier_->reach_layer();
  tier_->end_ahead();
  EXPECT_TRUE(in_vram().empty());
  tier_->settle();
}

// A token's end, or a user who thinks, is no time between two layers.
TEST_F(DeviceTierTest, TheTimeBetweenStepsIsNotMeasured) {
  tier_->start_rates(kFast, 1.0);
  tier_->copy_ahead({});
  tier_->begin_step();
  tier_->reach_layer();
  EXPECT_FALSE(tier_->has_time_ahead());
}

TEST_F(DeviceTierTest, NothingIsCopiedThatWouldTakeLonger) {
  begin_with(kSlow);
  EXPECT_FALSE(tier_->has_time_ahead());
  tier_->copy_ahead(Keys{3, 1});
  EXPECT_TRUE(in_vram().empty());
}

TEST_F(DeviceTierTest, NothingIsCopiedBehindOtherCopiesOrAgainstTheShare) {
  begin_with(kFast);
  device_.hold(ops::Queue::kUpload);
  tier_->copy_ahead(Keys{3});
  tier_->copy_ahead(Keys{1});
  EXPECT_EQ(in_vram(), Keys{3});
  device_.let_go(ops::Queue::kUpload);
  tier_->settle();
  tier_->set_host_share(0.5);
  tier_->copy_ahead(Keys{1});
  EXPECT_TRUE(in_vram().empty());
  tier_->set_host_share(std::nullopt);
}

// Ops of the next layer's dense part do not wait for it, but those that use it do.
TEST_F(DeviceTierTest, OnlyWhoeverUsesItWaitsForTheCopy) {
  begin_with(kFast);
  device_.hold(ops::Queue::kUpload);
  tier_->copy_ahead(Keys{3});
  const ops::Matrix x = room_.matrix(1, kHidden, 7);
  const ops::Matrix hidden = room_.matrix(kTopK, kIntermediate);
  const ops::Matrix routed = room_.matrix(kTopK, kHidden);
  compute_.zero(routed);
  const std::vector<float> zeros = room_.get(routed);  // comes although the copy is held
  EXPECT_EQ(zeros, std::vector<float>(zeros.size(), 0.0f));
  ExpertLayer layer;
  layer.x = x;
  layer.top_k = kTopK;
  layer.phase = ops::Phase::kDecode;
  const std::array<std::int32_t, 1> pair{0};
  tier_->compute_cached(std::vector<DeviceTier::Job>{{3, pair}}, {&layer, hidden, routed});
  tier_->end_ahead();
  device_.let_go(ops::Queue::kUpload);
  const std::vector<float> result = room_.get(routed);
  ops::testing::OwnedMatrix in(1, kHidden, 7), between(kTopK, kIntermediate), out(kTopK, kHidden);
  ops_->experts(std::array{ops::ExpertTask{&views_[3], pair}}, kTopK, in.view(), between.view(),
                out.view(), ops::Phase::kDecode);
  EXPECT_TRUE(std::equal(result.begin(), result.begin() + kHidden, out.values.begin()));
}

// Experts on their way back to RAM as the device fails.
class DeviceTierErrors : public DeviceTierTest {
 protected:
  // Two are cached in VRAM and have no place in RAM any more.
  void fill() {
    for (const ExpertKey key : {1u, 2u}) {
      ASSERT_TRUE(experts_->bring_for_later(key, view(key), true));
      experts_->release(key);
      experts_->wait_copied(key);
      store_->let_go(key);
    }
    for (const ExpertKey key : {5u, 6u, 7u, 8u}) bring(key);
    ASSERT_FALSE(store_->take_back(1));
    ASSERT_FALSE(store_->take_back(2));
    use(1);
    use(2);
  }
  ops::HostExpertView view(ExpertKey key) {
    EXPECT_EQ(store_->pin(key, true), ExpertStore::Found::kReady);
    return store_->view(key);
  }
  void use(ExpertKey key) {
    const auto expert = static_cast<std::int32_t>(key % kExperts);
    store_->note_use(key / kExperts, std::span(&expert, 1), std::vector<float>(kExperts));
  }
};

TEST_F(DeviceTierErrors, NoneIsTakenForOneThatCameBack) {
  fill();
  device_.fail_copy(ops::Queue::kDownload, 2);
  EXPECT_THROW(tier_->resize(2, 0), CudaError);
  EXPECT_EQ(experts_->leaving(), 0u);
  for (const ExpertKey key : {1u, 2u}) {
    EXPECT_EQ(store_->pin(key, true), ExpertStore::Found::kAbsent);
  }
  EXPECT_TRUE(store_->is_consistent());
  store_->resize(3, 2);  // as a strategy that is taken back does
  tier_->give_up();
  device_.clear_error();
  tier_->resize(2, 0);
  EXPECT_TRUE(in_vram().empty());
}

TEST_F(DeviceTierErrors, TheyMayGoMeanwhile) {
  fill();
  device_.fail_copy(ops::Queue::kDownload, 1);
  ASSERT_TRUE(experts_->can_send_back(1));
  const std::optional<ExpertBytes> place = store_->make_room_for(1);
  ASSERT_TRUE(place);
  experts_->send_back(1, *place);
  EXPECT_THROW(device_.synchronize(), CudaError);
  tier_.reset();
  EXPECT_EQ(experts_->leaving(), 0u);
}

TEST_F(DeviceTierErrors, AChangeOfTheSlotsCanBeLeft) {
  fill();
  EXPECT_THROW(tier_->resize(2, 0, [] { throw CancelledError(); }), CancelledError);
  EXPECT_EQ(experts_->slots(), 6u);
  EXPECT_EQ(in_vram(), (Keys{1, 2}));
  tier_->resize(2, 0);
  for (const ExpertKey key : {1u, 2u}) {
    EXPECT_EQ(store_->pin(key, true), ExpertStore::Found::kReady);
    store_->unpin(key);
  }
}

TEST_F(DeviceTierTest, AnErrorEndsIt) {
  begin_with(kFast);
  device_.fail_copy(ops::Queue::kUpload, 1);
  tier_->copy_ahead(Keys{3, 1});
  EXPECT_THROW(device_.synchronize(), CudaError);
  tier_->give_up();
  EXPECT_TRUE(in_vram().empty());
  EXPECT_EQ(tier_->copying(), 0u);
  device_.clear_error();
}

}  // namespace
}  // namespace dsfp4::residency
