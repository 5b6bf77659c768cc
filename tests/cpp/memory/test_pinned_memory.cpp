#include <cstring>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "base/warnings.h"
#include "memory/arena.h"
#include "memory/pinned_memory.h"

namespace dsfp4::memory {
namespace {

using testing::Warnings;

// Pins up to `limit` bytes, and touches the end of what it pins and unpins.
class LimitedPinner final : public Pinner {
 public:
  const char* pin(std::byte* memory, std::size_t bytes) noexcept override {
    const bool fits = pinned() + bytes <= limit;
    calls.push_back((fits ? "pin " : "refuse ") + std::to_string(bytes));
    if (!fits) return "no more";
    memory[bytes - 1] = std::byte{1};
    EXPECT_TRUE(blocks.emplace(memory, bytes).second);
    return nullptr;
  }
  bool unpin(std::byte* memory) noexcept override {
    calls.emplace_back("unpin");
    if (!unpins) return false;
    memory[blocks.at(memory) - 1] = std::byte{1};
    blocks.erase(memory);
    return true;
  }
  std::size_t pinned() const {
    std::size_t sum = 0;
    for (const auto& block : blocks) sum += block.second;
    return sum;
  }

  std::size_t limit = std::numeric_limits<std::size_t>::max() / 2;
  bool unpins = true;
  std::map<std::byte*, std::size_t> blocks;
  std::vector<std::string> calls;
};

using Calls = std::vector<std::string>;

class PinnedMemoryTest : public ::testing::Test {
 protected:
  LimitedPinner pinner_;
  PinnedMemory memory_{pinner_};
};

TEST_F(PinnedMemoryTest, ABlockIsPinnedAsAWholeOrNotAtAll) {
  pinner_.limit = 10'000;
  std::byte* first = memory_.allocate(8192);
  std::byte* second = memory_.allocate(8192);
  std::byte* third = memory_.allocate(1000);
  ASSERT_TRUE(first != nullptr && second != nullptr && third != nullptr);
  std::memset(second, 3, 8192);
  EXPECT_EQ(pinner_.blocks.count(second), 0u);
  for (const std::byte* pinned : {first, first + 8191, third, third + 999}) {
    EXPECT_TRUE(memory_.is_pinned(pinned));
  }
  EXPECT_FALSE(memory_.is_pinned(second));
  EXPECT_FALSE(memory_.is_pinned(second + 8191));
  memory_.release(second, 8192);
  memory_.release(first, 8192);
  memory_.release(third, 1000);
  EXPECT_EQ(pinner_.calls, (Calls{"pin 8192", "refuse 8192", "pin 1000", "unpin", "unpin"}));
}

TEST_F(PinnedMemoryTest, ABlockIsUnpinnedWhileItMoves) {
  constexpr std::size_t kLarge = std::size_t{3} << 20;
  pinner_.limit = kLarge + 8192;
  std::byte* block = memory_.allocate(4096);
  ASSERT_NE(block, nullptr);
  block[7] = std::byte{7};
  std::size_t bytes = 4096;
  for (const std::size_t after : {kLarge, 2 * kLarge, kLarge, std::size_t{4096}}) {
    std::byte* moved = memory_.resize(block, bytes, after);
    ASSERT_NE(moved, nullptr);
    block = moved;
    bytes = after;
    EXPECT_EQ(block[7], std::byte{7});
    block[bytes - 1] = std::byte{8};
    EXPECT_EQ(pinner_.blocks.count(block), after < 2 * kLarge ? 1u : 0u);
  }
  memory_.release(block, bytes);
  EXPECT_EQ(pinner_.calls, (Calls{"pin 4096", "unpin", "pin 3145728", "unpin", "refuse 6291456",
                                  "pin 3145728", "unpin", "pin 4096", "unpin"}));
}

TEST_F(PinnedMemoryTest, ABlockThatCannotMoveIsAsItWas) {
  std::byte* block = memory_.allocate(8192);
  block[7] = std::byte{7};
  EXPECT_EQ(memory_.resize(block, 8192, std::numeric_limits<std::size_t>::max() / 4), nullptr);
  EXPECT_EQ(block[7], std::byte{7});
  EXPECT_EQ(pinner_.blocks.at(block), 8192u);
  pinner_.unpins = false;
  EXPECT_EQ(memory_.resize(block, 8192, 4096), nullptr);
  EXPECT_EQ(pinner_.blocks.at(block), 8192u);
  pinner_.unpins = true;
  memory_.release(block, 8192);
  EXPECT_EQ(pinner_.calls, (Calls{"pin 8192", "unpin", "pin 8192", "unpin", "unpin"}));
}

TEST_F(PinnedMemoryTest, TheFirstRefusalIsSaidWithTheNumbers) {
  const Warnings warnings;
  pinner_.limit = 5'000'000;
  const Arena pinned(3 << 20, "a test", memory_);
  EXPECT_TRUE(warnings.with("").empty());
  const Arena refused(2 << 20, "a test", memory_);
  const Arena again(2 << 20, "a test", memory_);
  const std::vector<std::string> said = warnings.with("");
  ASSERT_EQ(said.size(), 1u);
  EXPECT_NE(said[0].find("2.1 MB of RAM beside the 3.1 MB that are pinned (no more)"),
            std::string::npos)
      << said[0];
  EXPECT_NE(said[0].find("ulimit -l"), std::string::npos);
}

TEST_F(PinnedMemoryTest, ALackOfRamIsNone) {
  const Warnings warnings;
  EXPECT_EQ(memory_.allocate(std::numeric_limits<std::size_t>::max() / 4), nullptr);
  EXPECT_TRUE(pinner_.calls.empty());
  EXPECT_TRUE(warnings.with("").empty());
}

// Else other pages could come to lie there that the device takes for pinned ones.
TEST_F(PinnedMemoryTest, WhatCannotBeUnpinnedStays) {
  std::byte* block = memory_.allocate(8192);
  const Warnings warnings;
  pinner_.unpins = false;
  memory_.release(block, 8192);
  std::memset(block, 1, 8192);
  EXPECT_EQ(warnings.with("failed to unpin").size(), 1u);
  pinner_.unpins = true;
  memory_.release(block, 8192);
  EXPECT_TRUE(pinner_.blocks.empty());
}

}  // namespace
}  // namespace dsfp4::memory
