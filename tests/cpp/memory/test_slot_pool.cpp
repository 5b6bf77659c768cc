#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <set>
#include <vector>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "memory/arena.h"
#include "memory/slot_pool.h"

namespace dsfp4::memory {
namespace {

// Counts what is out, and refuses the N-th.
class CountingSource final : public MemorySource {
 public:
  std::byte* allocate(std::size_t bytes) noexcept override {
    if (calls++ == refuse_at) return nullptr;
    std::byte* memory = real_.allocate(bytes);
    if (memory != nullptr) out += bytes;
    return memory;
  }
  void release(std::byte* memory, std::size_t bytes) noexcept override {
    out -= bytes;
    real_.release(memory, bytes);
  }
  bool host_accessible() const noexcept override { return true; }
  const char* name() const noexcept override { return "test"; }

  int calls = 0;
  int refuse_at = -1;
  std::size_t out = 0;

 private:
  MemorySource& real_ = host_memory();
};

TEST(PhasedLayout, KeepsThePhaseAndGivesEachExtentBlocksOfItsOwn) {
  for (const std::uint64_t offset : {0u, 1u, 4095u, 4096u, 123'457u}) {
    PhasedLayout layout;
    std::size_t end = 0;
    for (const std::size_t bytes : {1u, 4096u, 5000u, 12'345u}) {
      const std::size_t at = layout.add(offset, bytes);
      EXPECT_EQ(at % PhasedLayout::kBlock, offset % PhasedLayout::kBlock);
      EXPECT_GE(at / PhasedLayout::kBlock * PhasedLayout::kBlock, end);  // outward to the front
      end = (at + bytes + PhasedLayout::kBlock - 1) / PhasedLayout::kBlock * PhasedLayout::kBlock;
      EXPECT_EQ(layout.bytes(), end);  // and to the back
      PhasedLayout alone;
      alone.add(offset, bytes);
      EXPECT_LE(alone.bytes(), PhasedLayout::most(bytes));
    }
  }
  PhasedLayout worst;
  worst.add(4095, 4098);
  EXPECT_EQ(worst.bytes(), PhasedLayout::most(4098));
}

TEST(SlotPool, HandsOutEachSlotOnce) {
  SlotPool pool(5, 10'000, "the test's slots");
  EXPECT_EQ(pool.slot_bytes(), 12'288u);
  std::set<std::byte*> places;
  for (int i = 0; i < 5; ++i) {
    const int slot = pool.acquire();
    ASSERT_GE(slot, 0);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(pool.data(slot)) % PhasedLayout::kBlock, 0u);
    std::memset(pool.data(slot), i, pool.slot_bytes());
    places.insert(pool.data(slot));
  }
  EXPECT_EQ(places.size(), 5u);
  EXPECT_EQ(pool.acquire(), -1);
  pool.release(3);
  EXPECT_EQ(pool.free_count(), 1u);
  EXPECT_EQ(pool.acquire(), 3);
}

// Also where the source has no way of its own to resize.
TEST(SlotPool, ChangesItsSizeAndKeepsWhatStays) {
  CountingSource source;
  for (MemorySource* memory : {&host_memory(), static_cast<MemorySource*>(&source)}) {
    SlotPool pool(3, std::size_t{3} << 20, "the test's slots", *memory);
    const auto fill = [&](int slot, int value) {
      std::memset(pool.data(slot), value, pool.slot_bytes());
    };
    const auto holds = [&](int slot, int value) {
      const std::byte* data = pool.data(slot);
      return std::all_of(data, data + pool.slot_bytes(),
                         [&](std::byte b) { return b == static_cast<std::byte>(value); });
    };
    for (int i = 0; i < 3; ++i) fill(i, i + 1);
    pool.resize({true, false, true, false, false});
    EXPECT_EQ(pool.count(), 5u);
    EXPECT_EQ(pool.free_count(), 3u);
    EXPECT_TRUE(holds(0, 1) && holds(1, 2) && holds(2, 3));
    EXPECT_EQ(pool.acquire(), 1);
    EXPECT_EQ(pool.acquire(), 3);
    fill(4, 5);
    pool.resize({false, true});
    EXPECT_TRUE(holds(0, 1) && holds(1, 2));
    EXPECT_EQ(pool.acquire(), 0);
    EXPECT_EQ(pool.acquire(), -1);
    if (memory != &source) continue;
    source.refuse_at = source.calls;
    EXPECT_THROW(pool.resize(std::vector<bool>(9)), MemoryLimitError);
    EXPECT_EQ(pool.count(), 2u);
    EXPECT_TRUE(holds(1, 2));
  }
  EXPECT_EQ(source.out, 0u);
}

TEST(SlotPool, ImpossibleSizesAreTypedErrors) {
  constexpr std::size_t kMost = std::numeric_limits<std::size_t>::max();
  EXPECT_THROW(SlotPool(kMost / 4096, 8192, "the test's slots"), MemoryLimitError);
  EXPECT_THROW(SlotPool(1, kMost, "the test's slots"), MemoryLimitError);
  EXPECT_THROW(SlotPool(1, kMost / 4, "the test's slots"), MemoryLimitError);
}

TEST(MemorySource, EverythingGoesBackToWhereItCameFrom) {
  CountingSource source;
  const HostMemoryOverride override_(source);
  {
    Arena arena((std::size_t{3} << 20) + 5, "the test's values");
    Arena moved = std::move(arena);
    SlotPool pool(2, 5000, "the test's slots");
    EXPECT_EQ(source.calls, 2);
    EXPECT_EQ(source.out, moved.size() + pool.total_bytes());
    std::memset(on_host(source, moved.take(moved.size())), 1, moved.size());
  }
  EXPECT_EQ(source.out, 0u);
  source.refuse_at = 2;
  EXPECT_THROW(Arena(100, "the test's values"), MemoryLimitError);
}

TEST(MemorySource, LargeMemoryIsAlignedForHugePages) {
  constexpr std::size_t kHuge = std::size_t{2} << 20;
  for (const std::size_t bytes : {kHuge, kHuge + 1, 3 * kHuge - 4095}) {
    std::byte* memory = host_memory().allocate(bytes);
    ASSERT_NE(memory, nullptr);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory) % kHuge, 0u);
    memory[0] = memory[bytes - 1] = std::byte{1};
    host_memory().release(memory, bytes);
  }
}

}  // namespace
}  // namespace dsfp4::memory
