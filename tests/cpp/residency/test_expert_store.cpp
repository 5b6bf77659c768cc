#include <cerrno>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "residency/expert_store.h"
#include "residency/fake_reader.h"

namespace dsfp4::residency {
namespace {

using Found = ExpertStore::Found;
using storage::Priority;
using storage::ReadStatus;

constexpr std::int64_t kLayers = 2;
constexpr std::int64_t kExperts = 8;
const ops::ExpertView kView;

std::vector<ExpertImage> images() {
  std::vector<ExpertImage> all;
  for (ExpertKey key = 0; key < kLayers * kExperts; ++key) {
    ExpertImage image;
    image.files.parts.push_back({0, 100 + key, 50, 100 + key});
    image.files.slot_bytes = storage::kBlockBytes;
    image.view = &kView;
    for (MatrixPlace& place : image.places) place.data = 100 + key;
    all.push_back(image);
  }
  return all;
}

class ExpertStoreTest : public testing::Test {
 protected:
  ExpertStore& make(std::size_t slots, std::size_t cache_slots) {
    store_ = std::make_unique<ExpertStore>(
        ExpertStore::Options{kLayers, 3, kExperts, slots, cache_slots, check_, nullptr}, images(),
        reader_, make_policy("lru", kLayers, kExperts));
    return *store_;
  }
  ~ExpertStoreTest() override {
    store_.reset();  // waits for no read
    while (reader_.open() > 0) reader_.complete(reader_.reads.size() - reader_.open());
  }
  void bring(ExpertKey key, bool keep) {
    ASSERT_EQ(store_->fetch(key, keep), Found::kReading);
    reader_.complete(reader_.reads.size() - 1);
    store_->unpin(key);
  }
  void use(std::int64_t layer, std::int32_t expert) {
    const std::vector<float> scores(kExperts, 0.0f);
    store_->note_use(layer, std::span(&expert, 1), scores);
  }

  FakeReader reader_;
  std::function<void(std::span<const ExpertKey>, std::span<const ops::HostExpertView>)> check_;
  std::unique_ptr<ExpertStore> store_;
};

TEST_F(ExpertStoreTest, ChecksWhatWasReadOnceAndForgetsWhatIsWrong) {
  std::vector<ExpertKey> seen;
  bool wrong = true;
  check_ = [&](std::span<const ExpertKey> keys, std::span<const ops::HostExpertView> views) {
    for (std::size_t i = 0; i < keys.size(); ++i) {
      seen.push_back(keys[i]);
      EXPECT_EQ(views[i].up_proj.data[0], static_cast<std::byte>(100 + keys[i]));
    }
    if (wrong) throw CheckpointError("file", "tensor", 7, "is not what it was");
  };
  ExpertStore& store = make(4, 3);
  const std::vector<ExpertKey> both = {5, 6};
  const auto bring_both = [&] {
    for (const ExpertKey key : both) {
      ASSERT_EQ(store.fetch(key, true), Found::kReading);
      reader_.complete(reader_.reads.size() - 1);
    }
  };
  bring_both();
  EXPECT_THROW(store.check(both), CheckpointError);
  EXPECT_THROW(store.ready_of(both), CheckpointError);  // whoever else waits for them
  for (const ExpertKey key : both) store.unpin(key);
  EXPECT_TRUE(store.is_consistent());
  EXPECT_EQ(store.pin(5, true), Found::kAbsent);

  wrong = false;
  bring_both();
  seen.clear();
  store.check(std::vector<ExpertKey>{6});
  store.check(both);
  store.check(both);
  EXPECT_EQ(seen, (std::vector<ExpertKey>{6, 5}));
  for (const ExpertKey key : both) store.unpin(key);
  EXPECT_TRUE(store.is_consistent());
}

TEST_F(ExpertStoreTest, ReadsOnceHoweverManyAsk) {
  ExpertStore& store = make(4, 3);
  EXPECT_EQ(store.pin(5, true), Found::kAbsent);
  EXPECT_EQ(store.fetch(5, true), Found::kReading);
  EXPECT_EQ(store.pin(5, true), Found::kReading);
  EXPECT_EQ(store.pin(5, true), Found::kReading);
  EXPECT_EQ(reader_.reads.size(), 1u);
  EXPECT_TRUE(store.ready_of(std::vector<ExpertKey>{5}).empty());
  reader_.complete(0);
  EXPECT_EQ(store.ready_of(std::vector<ExpertKey>{5}, kPollPeriod), std::vector<ExpertKey>{5});
  EXPECT_EQ(store.view(5).gate_proj.data[0], static_cast<std::byte>(105));
  for (int i = 0; i < 3; ++i) store.unpin(5);
  EXPECT_EQ(store.pin(5, true), Found::kReady);
  store.unpin(5);
  const StoreStats stats = store.stats();
  EXPECT_EQ(stats.misses, 1u);
  EXPECT_EQ(stats.joined, 2u);
  EXPECT_EQ(stats.hits, 1u);
  EXPECT_TRUE(store.is_consistent());
}

TEST_F(ExpertStoreTest, GivesUpTheLeastValuedAndNeverAPinnedOne) {
  ExpertStore& store = make(3, 2);
  for (const ExpertKey key : {0u, 1u, 2u}) {
    bring(key, true);
    use(0, static_cast<std::int32_t>(key));
  }
  ASSERT_EQ(store.pin(0, true), Found::kReady);
  store.trim();
  store.unpin(0);
  // 1 went: 0 was pinned. Its slot is the next to be taken.
  bring(3, true);
  EXPECT_EQ(store.pin(1, true), Found::kAbsent);
  EXPECT_EQ(store.pin(0, true), Found::kReady);
  EXPECT_EQ(store.pin(2, true), Found::kReady);
  store.unpin(0);
  store.unpin(2);
  EXPECT_TRUE(store.is_consistent());
}

TEST_F(ExpertStoreTest, HasNoRoomWhenAllIsPinned) {
  ExpertStore& store = make(2, 1);
  EXPECT_EQ(store.fetch(0, true), Found::kReading);
  EXPECT_EQ(store.fetch(1, true), Found::kReading);
  EXPECT_EQ(store.fetch(2, true), Found::kNoRoom);
  reader_.complete(0);
  reader_.complete(1);
  EXPECT_EQ(store.fetch(2, true), Found::kNoRoom);
  store.unpin(0);
  EXPECT_EQ(store.fetch(2, true), Found::kReading);
  reader_.complete(2);
  store.unpin(1);
  store.unpin(2);
}

TEST_F(ExpertStoreTest, StreamsPastTheCache) {
  ExpertStore& store = make(3, 2);
  bring(0, true);
  bring(1, true);
  for (ExpertKey key = 8; key < 16; ++key) bring(key, false);
  EXPECT_EQ(store.pin(0, true), Found::kReady);
  EXPECT_EQ(store.pin(1, true), Found::kReady);
  store.unpin(0);
  store.unpin(1);
  EXPECT_EQ(store.stats().evictions, 0u);
}

TEST_F(ExpertStoreTest, ThePlaceOfAnExpertThatAnotherMemoryKeepsIsTakenFirst) {
  ExpertStore& store = make(3, 2);
  bring(0, true);
  bring(1, true);
  use(0, 0);
  use(0, 1);  // is worth more
  EXPECT_EQ(store.pin(1, true), Found::kReady);
  store.let_go(1);
  EXPECT_EQ(store.cache_room(), 1u);
  EXPECT_TRUE(store.take_back(1));  // it was there still
  EXPECT_EQ(store.cache_room(), 0u);
  EXPECT_EQ(store.pin(1, true), Found::kReady);
  store.let_go(1);
  bring(2, true);
  bring(3, true);
  EXPECT_FALSE(store.take_back(1));
  EXPECT_EQ(store.pin(0, true), Found::kReady);
  store.unpin(0);
  EXPECT_TRUE(store.is_consistent());
}

TEST_F(ExpertStoreTest, AnExpertComesBackFromAnotherMemoryIfItIsWorthMore) {
  ExpertStore& store = make(2, 1);
  bring(0, true);
  bring(4, false);  // passes by
  use(0, 1);
  use(0, 0);
  use(0, 2);
  EXPECT_FALSE(store.make_room_for(0));  // is there
  const std::optional<ExpertBytes> first = store.make_room_for(1);
  ASSERT_TRUE(first);  // the place of 4; 1 is worth less than 0, and trim() would find out
  EXPECT_EQ(store.pin(1, true), Found::kReading);
  EXPECT_TRUE(store.ready_of(std::vector<ExpertKey>{1}).empty());
  first->gate_proj.data[0] = std::byte{201};
  store.came_back(1, true);
  EXPECT_EQ(store.ready_of(std::vector<ExpertKey>{1}), std::vector<ExpertKey>{1});
  EXPECT_EQ(store.view(1).gate_proj.data[0], std::byte{201});
  store.unpin(1);
  EXPECT_FALSE(store.make_room_for(5));  // was never used
  ASSERT_TRUE(store.make_room_for(2));   // is worth more than 1
  EXPECT_EQ(store.pin(1, true), Found::kAbsent);
  EXPECT_EQ(reader_.open(), 0u);
  store.came_back(2, true);
  store.trim();
  EXPECT_TRUE(store.is_consistent());
}

TEST_F(ExpertStoreTest, AnExpertThatDoesNotComeBackIsAbsent) {
  ExpertStore& store = make(2, 1);
  ASSERT_TRUE(store.make_room_for(1));
  store.came_back(1, false);
  EXPECT_EQ(store.pin(1, true), Found::kAbsent);
  ASSERT_TRUE(store.make_room_for(1));
  EXPECT_EQ(store.pin(1, true), Found::kReading);
  store.came_back(1, false);
  EXPECT_THROW(store.ready_of(std::vector<ExpertKey>{1}), CudaError);  // who waits for it is told
  store.unpin(1);
  EXPECT_TRUE(store.is_consistent());
  bring(1, true);
  EXPECT_EQ(store.pin(1, true), Found::kReady);
  store.unpin(1);
}

TEST_F(ExpertStoreTest, PromotesASpeculativeRead) {
  ExpertStore& store = make(4, 3);
  EXPECT_EQ(store.prefetch(9), Found::kReading);
  EXPECT_EQ(store.prefetch(9), Found::kReady);
  EXPECT_EQ(reader_.reads[0].request.priority, Priority::kSpeculative);
  EXPECT_EQ(store.pin(9, true), Found::kReading);
  EXPECT_EQ(reader_.reads[0].request.priority, Priority::kDemand);
  store.drop_speculation(1);  // it is none any more
  EXPECT_TRUE(reader_.cancelled.empty());
  reader_.complete(0);
  store.unpin(9);
  EXPECT_EQ(store.stats().prefetched, 1u);
  EXPECT_EQ(reader_.reads.size(), 1u);
}

TEST_F(ExpertStoreTest, SpeculationTakesNothingThatIsCached) {
  ExpertStore& store = make(3, 2);
  bring(0, true);
  bring(1, true);
  EXPECT_EQ(store.prefetch(8), Found::kReading);
  EXPECT_EQ(store.prefetch(9), Found::kNoRoom);
  reader_.complete(2);
  store.drop_speculation(1);
  EXPECT_EQ(store.prefetch(9), Found::kReading);  // takes the place of 8
  EXPECT_EQ(store.stats().wasted_bytes, 50u);
  EXPECT_EQ(store.pin(8, true), Found::kAbsent);
}

TEST_F(ExpertStoreTest, WhatWasReadAheadInVainStaysWhileThereIsRoomAndGoesFirst) {
  ExpertStore& store = make(4, 2);
  EXPECT_EQ(store.prefetch(8), Found::kReading);
  EXPECT_EQ(store.prefetch(9), Found::kReading);
  reader_.complete(0);
  reader_.complete(1);
  store.drop_speculation(1);
  use(1, 0);  // of 8, so that its value would keep it
  EXPECT_EQ(store.cache_room(), 0u);
  EXPECT_EQ(store.stats().wasted_bytes, 0u);
  EXPECT_EQ(store.pin(9, true), Found::kReady);  // of use after all
  store.unpin(9);
  EXPECT_EQ(store.stats().prefetched, 1u);
  bring(0, true);
  store.trim();
  EXPECT_EQ(store.stats().wasted_bytes, 50u);  // 8
  EXPECT_EQ(store.pin(9, true), Found::kReady);
  store.unpin(9);
}

TEST_F(ExpertStoreTest, NamesTheMostValuedExpertsOfALayerFirst) {
  ExpertStore& store = make(4, 2);
  use(1, 2);
  use(1, 5);
  const std::vector<ExpertKey> keys = store.most_valued(1);
  ASSERT_EQ(keys.size(), static_cast<std::size_t>(kExperts));
  EXPECT_EQ(keys[0], static_cast<ExpertKey>(kExperts + 5));
  EXPECT_EQ(keys[1], static_cast<ExpertKey>(kExperts + 2));
}

TEST_F(ExpertStoreTest, ACancelledSpeculationIsReadAgainWhenAskedFor) {
  ExpertStore& store = make(3, 2);
  EXPECT_EQ(store.prefetch(8), Found::kReading);
  store.drop_speculation(1);
  ASSERT_EQ(reader_.cancelled.size(), 1u);
  EXPECT_EQ(store.pin(8, true), Found::kAbsent);
  EXPECT_EQ(store.fetch(8, true), Found::kReading);
  reader_.complete(1);
  EXPECT_EQ(store.ready_of(std::vector<ExpertKey>{8}, kPollPeriod).size(), 1u);
  reader_.complete_cancelled();
  store.unpin(8);
  // The cancelled one's slot comes back: all three can be had.
  bring(0, true);
  bring(1, true);
  EXPECT_EQ(store.pin(8, true), Found::kReady);
  store.unpin(8);
  EXPECT_TRUE(store.is_consistent());
}

TEST_F(ExpertStoreTest, AFailedSpeculationIsReadAgainWhenAskedFor) {
  ExpertStore& store = make(3, 2);
  EXPECT_EQ(store.prefetch(10), Found::kReading);
  reader_.complete(0, ReadStatus::kFailed);
  EXPECT_EQ(store.pin(10, true), Found::kAbsent);
  bring(10, true);
  EXPECT_EQ(store.pin(10, true), Found::kReady);
  store.unpin(10);
  EXPECT_TRUE(store.is_consistent());
}

TEST_F(ExpertStoreTest, AFailedReadNamesLayerAndExpertAndMayBeTriedAgain) {
  ExpertStore& store = make(3, 2);
  EXPECT_EQ(store.fetch(10, true), Found::kReading);
  EXPECT_EQ(store.pin(10, true), Found::kReading);
  reader_.complete(0, ReadStatus::kFailed);
  try {
    store.ready_of(std::vector<ExpertKey>{10}, kPollPeriod);
    FAIL();
  } catch (const IoError& error) {
    EXPECT_NE(std::string(error.what()).find("expert 2 of layer 4"), std::string::npos);
    EXPECT_EQ(error.offset(), 77);
    EXPECT_EQ(error.error_number(), EIO);
  }
  store.unpin(10);
  store.unpin(10);
  EXPECT_TRUE(store.is_consistent());
  for (const ExpertKey key : {10u, 11u, 12u}) EXPECT_EQ(store.fetch(key, true), Found::kReading);
  for (std::size_t i = 1; i < 4; ++i) reader_.complete(i);
  for (const ExpertKey key : {10u, 11u, 12u}) store.unpin(key);
}

// A slot that the system may still write to is nobody's; who needs it hears of the read.
TEST_F(ExpertStoreTest, ReadsThatAreNeverAnsweredHoldTheirSlotsAndAreNamed) {
  ExpertStore& store = make(3, 2);
  bring(3, true);
  for (const ExpertKey key : {10u, 11u}) EXPECT_EQ(store.fetch(key, true), Found::kReading);
  for (const std::size_t read : {1u, 2u}) reader_.complete(read, ReadStatus::kFailed, ETIMEDOUT);
  EXPECT_THROW(store.ready_of(std::vector<ExpertKey>{10, 11}, kPollPeriod), IoError);
  for (const ExpertKey key : {10u, 11u}) store.unpin(key);

  const auto names_it = [](const auto& call) {
    try {
      call();
      return false;
    } catch (const IoError& error) {
      return error.file() == "model.safetensors" && error.offset() == 77 &&
             error.error_number() == ETIMEDOUT;
    }
  };
  EXPECT_EQ(store.fetch(12, false), Found::kNoRoom);
  EXPECT_TRUE(names_it([&] { store.wait_for_room(); }));
  EXPECT_TRUE(names_it([&] { store.resize(4, 3); }));
  EXPECT_EQ(store.pin(3, true), Found::kReady);
  store.wait_for_room();  // what is pinned may be unpinned
  store.unpin(3);
  EXPECT_TRUE(store.is_consistent());

  reader_.let_go(1);
  store.wait_for_room();
  EXPECT_TRUE(names_it([&] { store.resize(4, 3); }));  // the other one
  EXPECT_EQ(store.fetch(12, false), Found::kReading);
  reader_.complete(3);
  store.unpin(12);
  reader_.let_go(2);
  store.resize(4, 3);
  EXPECT_EQ(store.pin(3, true), Found::kReady);
  store.unpin(3);
  EXPECT_TRUE(store.is_consistent());
}

TEST_F(ExpertStoreTest, AWaitForAReadCanBeLeft) {
  ExpertStore& store = make(2, 1);
  ASSERT_EQ(store.fetch(3, true), Found::kReading);
  int asked = 0;
  const Poll leave = [&] {
    if (++asked % 2 == 0) throw CancelledError();
  };
  const std::vector<ExpertKey> keys = {3};
  EXPECT_TRUE(store.ready_of(keys, kPollPeriod).empty());
  store.unpin(3);
  EXPECT_THROW(store.resize(3, 1, leave), CancelledError);
  reader_.complete(0);
  EXPECT_EQ(store.pin(3, true), Found::kReady);
  store.unpin(3);
  EXPECT_TRUE(store.is_consistent());
}

TEST_F(ExpertStoreTest, GoesWithoutTheReadsThatItBegan) {
  make(2, 1);
  ASSERT_EQ(store_->fetch(3, true), Found::kReading);
  ASSERT_EQ(store_->prefetch(4), Found::kReading);
  store_.reset();
  EXPECT_EQ(reader_.cancelled.size(), 2u);
  reader_.complete(0);  // into slots that the request owns; there is no store to tell
  reader_.complete(1, ReadStatus::kCancelled);
}

TEST_F(ExpertStoreTest, ResizeKeepsTheMostValuable) {
  ExpertStore& store = make(6, 5);
  for (ExpertKey key = 0; key < 5; ++key) {
    bring(key, true);
    use(0, static_cast<std::int32_t>(key));
  }
  store.resize(3, 2);
  EXPECT_TRUE(store.is_consistent());
  for (const ExpertKey key : {3u, 4u}) {
    ASSERT_EQ(store.pin(key, true), Found::kReady);
    for (int b = 0; b < 50; ++b) {
      EXPECT_EQ(store.view(key).up_proj.data[b], static_cast<std::byte>(100 + key + b));
    }
    store.unpin(key);
  }
  EXPECT_EQ(store.pin(2, true), Found::kAbsent);
  store.resize(10, 9);
  EXPECT_EQ(store.pin(4, true), Found::kReady);
  EXPECT_EQ(store.view(4).down_proj.data[49], static_cast<std::byte>(153));
  store.unpin(4);
  EXPECT_THROW(store.resize(2, 2), ParameterError);
}

TEST_F(ExpertStoreTest, WarmsUpWithWhatThePolicyValues) {
  ExpertStore& store = make(4, 2);
  for (const std::int32_t e : {5, 6, 7}) use(1, e);
  store.warm_up();
  ASSERT_EQ(reader_.reads.size(), 2u);
  EXPECT_EQ(store.pin(15, true), Found::kReading);
  EXPECT_EQ(reader_.reads[0].request.priority, Priority::kDemand);  // 7, promoted
  EXPECT_EQ(reader_.reads[1].request.priority, Priority::kSpeculative);
  reader_.complete(0);
  reader_.complete(1);
  store.unpin(15);
  EXPECT_EQ(store.pin(14, true), Found::kReady);
  store.unpin(14);
}

}  // namespace
}  // namespace dsfp4::residency
