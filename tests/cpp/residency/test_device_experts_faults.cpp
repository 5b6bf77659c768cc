// Experts in the memory of an emulated device: failures, other numbers of slots, and anything in
// any order.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <map>
#include <random>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "residency/device_experts_fixture.h"

namespace dsfp4::residency {
namespace {

using ops::Queue;

/// Fails the n-th call that queues something, as it is made; all else is another device's.
class FailingDevice final : public ops::Device {
 public:
  explicit FailingDevice(ops::Device& device) : device_(device) {}
  void fail_call(int n) { fails_in_ = n; }

  memory::MemorySource& memory() override { return device_.memory(); }
  memory::MemorySource& staging() override { return device_.staging(); }
  void upload(const void* from, DevicePtr<void> to, std::size_t bytes) override {
    device_.upload(from, to, bytes);
  }
  void download(DevicePtr<const void> from, void* to, std::size_t bytes) override {
    device_.download(from, to, bytes);
  }
  void copy_in(Queue queue, const void* staged, DevicePtr<void> to, std::size_t bytes) override {
    count();
    device_.copy_in(queue, staged, to, bytes);
  }
  void copy_out(Queue queue, DevicePtr<const void> from, void* staged, std::size_t bytes) override {
    device_.copy_out(queue, from, staged, bytes);
  }
  ops::Event make_event() override { return device_.make_event(); }
  void record(Queue queue, const ops::Event& event) override {
    count();
    device_.record(queue, event);
  }
  void wait(Queue queue, const ops::Event& event) override {
    count();
    device_.wait(queue, event);
  }
  bool passed(const ops::Event& event) override { return device_.passed(event); }
  ops::Event make_timed_event() override { return device_.make_timed_event(); }
  Clock::time_point time_of(const ops::Event& event) override { return device_.time_of(event); }
  void wait_for(const ops::Event& event) override { device_.wait_for(event); }
  void synchronize() override { device_.synchronize(); }

 private:
  void free_event(void*) noexcept override {}
  void count() {
    if (fails_in_ > 0 && --fails_in_ == 0) throw CudaError("a call fails, as ordered");
  }

  ops::Device& device_;
  int fails_in_ = 0;
};

class DeviceExpertsFaults : public DeviceExpertsTest {
 protected:
  FailingDevice failing{device};
};

// ---- errors

TEST_F(DeviceExpertsFaults, ExpertsWhoseCopiesFailedAreGivenUp) {
  make(4, 3);
  pass(0, true);
  experts->wait_copied(0);
  device.fail_copy(Queue::kUpload, 2);
  pass(1, true);
  ASSERT_NE(bring(2, true), nullptr);
  EXPECT_THROW(experts->wait_copied(2), CudaError);
  EXPECT_TRUE(experts->is_consistent());
  EXPECT_TRUE(experts->has(0));
  EXPECT_FALSE(experts->has(1));
  EXPECT_THROW(experts->copied(2), CudaError);
  release(2);
  EXPECT_FALSE(experts->has(2));
  EXPECT_EQ(experts->cached(), 1u);

  device.clear_error();
  compute(*bring(1, true), 1);
  compute(*experts->find(0), 0);
  EXPECT_EQ(result(1), expected[1]);
  EXPECT_EQ(result(0), expected[0]);
  EXPECT_TRUE(experts->copied(1));
  release(1);
  release(0);
  EXPECT_EQ(experts->cached(), 2u);
}

TEST_F(DeviceExpertsFaults, AFailedCallLeavesNothingOfTheExpert) {
  make_on(failing, 2, 1);
  int failures = 0;
  for (int n = 1;; ++n) {
    device.delay_copies(Queue::kUpload, std::chrono::milliseconds(1));
    failing.fail_call(n);
    const std::int64_t copies = device.counts().copies_in(Queue::kUpload);
    try {
      ASSERT_NE(experts->bring(1, source[1], true), nullptr);
      break;
    } catch (const CudaError&) {
      ++failures;
    }
    const std::int64_t made = device.counts().copies_in(Queue::kUpload) - copies;
    EXPECT_EQ(made, std::clamp(n - 2, 0, 6));  // none is under way
    EXPECT_TRUE(experts->is_consistent());
    EXPECT_FALSE(experts->has(1));
    EXPECT_TRUE(experts->copied(1));
    EXPECT_EQ(experts->cached(), 0u);
    EXPECT_EQ(experts->stats().brought, 0u);
  }
  EXPECT_EQ(failures, 9);  // a wait, six copies, a record, a wait
  failing.fail_call(0);
  compute(*experts->find(1), 1);
  EXPECT_EQ(result(1), expected[1]);
  EXPECT_NE(bring(0, false), nullptr);  // both slots are there
}

TEST_F(DeviceExpertsFaults, ReleasesAreOrderedEvenIfTheirEventFails) {
  make_on(failing, 1, 0);
  compute(*bring(0, false), 0);
  failing.fail_call(1);
  release(0);
  const std::int64_t waits = device.counts().host_waits;
  compute(*bring(1, false), 1);
  EXPECT_EQ(device.counts().host_waits, waits + 1);
  release(1);
  ASSERT_NE(bring(2, false), nullptr);
  EXPECT_EQ(device.counts().host_waits, waits + 1);
  EXPECT_EQ(result(0), expected[0]);
  EXPECT_EQ(result(1), expected[1]);

  // The next event of the same slot is behind those ops, too.
  make_on(failing, 2, 1);
  worth[1] = 1.0f;
  ASSERT_NE(bring(0, true), nullptr);
  failing.fail_call(1);
  release(0);
  ASSERT_NE(experts->find(0), nullptr);
  release(0);
  ASSERT_NE(bring(2, false), nullptr);
  const std::int64_t later_waits = device.counts().host_waits;
  ASSERT_NE(bring(1, true), nullptr);  // where 0 lay
  EXPECT_EQ(device.counts().host_waits, later_waits);
}

TEST_F(DeviceExpertsFaults, SlotsThatThereIsNoMemoryForAreErrors) {
  device.memory().fail_allocation(1);
  EXPECT_THROW(make(2, 1), MemoryLimitError);
  try {
    make(std::size_t{1} << 62, 1);
    FAIL() << "more slots than addresses";
  } catch (const MemoryLimitError&) {
  }
  const std::size_t slot = DeviceExperts::slot_bytes(source[0]);
  const std::size_t most = device.memory().available() / slot;
  EXPECT_THROW(make(most + 1, most), MemoryLimitError);
  make(most, most - 1);
  EXPECT_EQ(experts->slots(), most);
}

// ---- other numbers of slots

TEST_F(DeviceExpertsFaults, AnotherNumberOfSlots) {
  const std::size_t before = device.memory().used();
  const std::size_t slot = DeviceExperts::slot_bytes(source[0]);
  make(3, 2);
  ASSERT_NE(bring(0, true), nullptr);
  EXPECT_THROW(experts->resize(4, 2), std::logic_error);
  EXPECT_TRUE(experts->has(0));
  release(0);
  EXPECT_THROW(experts->resize(2, 2), ParameterError);
  EXPECT_THROW(experts->resize(0, 0), ParameterError);
  EXPECT_TRUE(experts->has(0));

  device.delay_copies(Queue::kUpload, std::chrono::milliseconds(2));
  compute(*bring(1, true), 1);
  release(1);
  std::size_t before_that = 3;
  for (const std::size_t slots : {5u, 2u, 2u}) {
    experts->resize(slots, slots - 1);
    EXPECT_EQ(result(1), expected[1]);
    EXPECT_EQ(experts->slots(), slots);
    EXPECT_EQ(experts->cache_slots(), slots - 1);
    // They are one block, which stays or goes.
    EXPECT_EQ(experts->cached(), slots < before_that ? 0u : std::min<std::size_t>(2, slots - 1));
    before_that = slots;
    EXPECT_TRUE(experts->copied(1));
    EXPECT_EQ(device.memory().used() - before, slots * slot);
    EXPECT_TRUE(experts->is_consistent());
    if (experts->has(1)) {
      compute(*experts->find(1), 1);
    } else {
      compute(*bring(1, true), 1);
    }
    ASSERT_NE(bring(2, false), nullptr);
    release(1);
    release(2);
  }
  EXPECT_EQ(result(1), expected[1]);
}

TEST_F(DeviceExpertsFaults, ThoseWorthMostStayWhereTheirBlockDoes) {
  make(40, 16);  // 16, 16 and 8 slots
  for (ExpertKey key = 0; key < kExperts; ++key) {
    worth[key] = static_cast<float>(key);
    pass(key, true);
  }
  for (ExpertKey key = 0; key < kExperts; ++key) experts->wait_copied(key);
  EXPECT_TRUE(experts->going(60, 17).empty());
  experts->resize(60, 17);
  EXPECT_EQ(experts->cached(), 16u);
  // The block that holds them stays.
  EXPECT_EQ(experts->going(20, 6), (std::vector<ExpertKey>{9, 8, 7, 6, 5, 4, 3, 2, 1, 0}));
  experts->resize(20, 6);
  EXPECT_EQ(experts->cached(), 6u);
  EXPECT_EQ(experts->slots(), 20u);
  for (ExpertKey key = 10; key < kExperts; ++key) {
    const ops::ExpertView* view = experts->find(key);
    ASSERT_NE(view, nullptr) << key;
    compute(*view, key - 10);
    release(key);
    EXPECT_EQ(result(key - 10), expected[key]);
  }
  EXPECT_TRUE(experts->is_consistent());
  experts->resize(8, 7);  // no block is so small
  EXPECT_EQ(experts->cached(), 0u);
  EXPECT_TRUE(experts->is_consistent());
}

TEST_F(DeviceExpertsFaults, WhereThereIsNoRoomForMoreSlotsTheyStay) {
  make(3, 2);
  pass(0, true);
  const std::size_t used = device.memory().used();
  const std::size_t slot = DeviceExperts::slot_bytes(source[0]);
  EXPECT_THROW(experts->resize(device.memory().available() / slot + 4, 2), MemoryLimitError);
  EXPECT_TRUE(experts->has(0));
  device.memory().fail_allocation(1);
  EXPECT_THROW(experts->resize(4, 3), MemoryLimitError);
  EXPECT_EQ(experts->slots(), 3u);
  EXPECT_EQ(experts->cache_slots(), 2u);
  EXPECT_EQ(device.memory().used(), used);
  compute(*experts->find(0), 0);
  EXPECT_EQ(result(0), expected[0]);
  EXPECT_TRUE(experts->is_consistent());
}

TEST_F(DeviceExpertsFaults, GoesWhileCopiesAndOpsAreUnderWay) {
  const std::size_t before = device.memory().allocations();
  make(4, 2);
  device.delay_copies(Queue::kUpload, std::chrono::milliseconds(2));
  for (ExpertKey key = 0; key < 4; ++key) compute(*bring(key, true), key);
  release(0);
  experts.reset();
  EXPECT_EQ(device.memory().allocations(), before);
  for (ExpertKey key = 0; key < 4; ++key) EXPECT_EQ(result(key), expected[key]);

  make(4, 2);
  device.fail_copy(Queue::kUpload, 3);
  compute(*bring(0, true), 0);
  experts.reset();
  EXPECT_THROW(device.synchronize(), CudaError);
  device.clear_error();
  EXPECT_EQ(device.memory().allocations(), before);
}

// ---- anything at all

// DeviceExperts as it should be, with a map.
struct Model {
  struct Entry {
    int pins = 0;
    bool cached = false;
  };
  std::size_t slots = 0;
  std::size_t cache_slots = 0;
  std::map<ExpertKey, Entry> there;
  std::uint64_t evictions = 0;

  std::size_t cached() const {
    return static_cast<std::size_t>(
        std::ranges::count_if(there, [](const auto& e) { return e.second.cached; }));
  }
  bool bring(ExpertKey key, bool keep, std::span<const float> worth) {
    bool cached = keep && this->cached() < cache_slots;
    if (keep && !cached) {
      auto least = there.end();
      for (auto it = there.begin(); it != there.end(); ++it) {
        if (!it->second.cached || it->second.pins > 0) continue;
        if (least == there.end() || worth[it->first] < worth[least->first]) least = it;
      }
      cached = least != there.end() && worth[least->first] < worth[key];
      if (cached) {
        there.erase(least);
        ++evictions;
      }
    }
    if (there.size() == slots) return false;
    there[key] = {1, cached};
    return true;
  }
  void release(ExpertKey key) {
    Entry& entry = there.at(key);
    if (--entry.pins == 0 && !entry.cached) there.erase(key);
  }
};

TEST_F(DeviceExpertsFaults, AsAModelSays) {
  std::mt19937 bits(11);
  const auto below = [&](std::size_t n) { return static_cast<std::size_t>(bits() % n); };
  for (std::size_t i = 0; i < kExperts; ++i) worth[i] = static_cast<float>(i);
  make(6, 3);
  Model model{6, 3, {}, 0};
  std::vector<ExpertKey> pinned;
  std::map<std::int64_t, ExpertKey> computed;  // by the place of the result
  const auto check_results = [&] {
    for (const auto& [place, key] : computed) ASSERT_EQ(result(place), expected[key]);
    computed.clear();
  };
  const auto use = [&](ExpertKey key, const ops::ExpertView& view) {
    pinned.push_back(key);
    if (computed.size() == kResults) check_results();
    const auto place = static_cast<std::int64_t>(computed.size());
    compute(view, place);
    computed[place] = key;
  };
  std::uint64_t refused = 0;
  for (int step = 0; step < 2000 && !HasFatalFailure(); ++step) {
    SCOPED_TRACE(step);
    const auto key = static_cast<ExpertKey>(below(kExperts));
    const std::size_t what = below(20);
    if (what < 9) {
      ASSERT_EQ(experts->has(key), model.there.contains(key));
      const ops::ExpertView* view = experts->find(key);
      ASSERT_EQ(view != nullptr, model.there.contains(key));
      if (view != nullptr) {
        ++model.there[key].pins;
      } else {
        const bool keep = below(2) == 0;
        experts->revalue();
        view = experts->bring(key, source[key], keep);
        ASSERT_EQ(view != nullptr, model.bring(key, keep, worth));
        refused += view == nullptr;
      }
      if (view != nullptr) use(key, *view);
    } else if (what < 17 && !pinned.empty()) {
      const std::size_t i = below(pinned.size());
      experts->release(pinned[i]);
      model.release(pinned[i]);
      pinned.erase(pinned.begin() + static_cast<std::ptrdiff_t>(i));
    } else if (what == 17) {
      std::swap(worth[key], worth[below(kExperts)]);
    } else if (what == 18) {
      experts->wait_copied(key);
      ASSERT_TRUE(experts->copied(key));
    } else if (below(10) == 0) {
      for (const ExpertKey pin : std::exchange(pinned, {})) {
        experts->release(pin);
        model.release(pin);
      }
      const std::size_t slots = 2 + below(6);
      const std::size_t cache_slots = below(slots);
      const std::vector<ExpertKey> going = experts->going(slots, cache_slots);
      experts->resize(slots, cache_slots);
      model.slots = slots;
      model.cache_slots = cache_slots;
      for (const ExpertKey gone : going) ASSERT_EQ(model.there.erase(gone), 1u);
      for (const auto& [there, entry] : model.there) ASSERT_TRUE(experts->has(there));
    }
    ASSERT_EQ(experts->cached(), model.cached());
    ASSERT_EQ(experts->cache_room(), model.cache_slots - model.cached());
    ASSERT_EQ(experts->stats().evictions, model.evictions);
    ASSERT_TRUE(experts->is_consistent());
  }
  check_results();
  EXPECT_GT(refused, 0u);
  EXPECT_GT(model.evictions, 20u);
}

}  // namespace
}  // namespace dsfp4::residency
