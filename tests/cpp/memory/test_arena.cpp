#include <cstdint>
#include <cstring>
#include <limits>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "memory/arena.h"
#include "memory/limits.h"

namespace dsfp4::memory {
namespace {

TEST(Arena, HandsOutAlignedMemoryFrontToBack) {
  Arena arena(Arena::padded(10) + Arena::padded(100), "the test's values");
  std::byte* a = on_host(host_memory(), arena.take(10));
  std::byte* b = on_host(host_memory(), arena.take(100));
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(a) % Arena::kAlignment, 0u);
  EXPECT_EQ(b - a, static_cast<std::ptrdiff_t>(Arena::kAlignment));
  std::memset(a, 1, 10);
  std::memset(b, 2, 100);
  EXPECT_EQ(arena.used(), arena.size());
}

TEST(Arena, RefusesMoreThanItHolds) {
  Arena arena(2 * Arena::kAlignment, "the test's values");
  arena.take(Arena::kAlignment + 1);
  EXPECT_THROW(arena.take(1), MemoryLimitError);
  EXPECT_THROW(arena.take(std::numeric_limits<std::size_t>::max()), MemoryLimitError);
}

TEST(Arena, ReleaseGivesBackSinceTheMark) {
  Arena arena(3 * Arena::kAlignment, "the test's values");
  arena.take(Arena::kAlignment);
  const std::size_t mark = arena.used();
  const DevicePtr<std::byte> first = arena.take(2 * Arena::kAlignment);
  arena.release(mark);
  EXPECT_EQ(arena.take(2 * Arena::kAlignment), first);
}

TEST(Arena, ImpossibleSizeIsATypedErrorWithThePurpose) {
  try {
    Arena arena(std::numeric_limits<std::size_t>::max() / 4, "the weights");
    FAIL() << "an arena of 4 EiB was given";
  } catch (const MemoryLimitError& error) {
    EXPECT_NE(std::string(error.what()).find("the weights"), std::string::npos);
  }
}

TEST(Arena, AvailableMemoryIsPlausible) { EXPECT_GT(available_memory(), std::size_t{1} << 24); }

}  // namespace
}  // namespace dsfp4::memory
