#include <set>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "engine/kv_cache.h"

namespace dsfp4::engine {
namespace {

KvCache cache_of(std::int64_t tokens) { return {tokens, 2, 1000, ops::KvFormat::kBf16}; }

TEST(KvCache, SequencesTakeBlocksAsTheyGrowAndGiveThemBack) {
  KvCache cache = cache_of(5 * ops::kKvBlockTokens);
  EXPECT_EQ(cache.free_blocks(), 5u);
  {
    Sequence a(cache);
    Sequence b(cache);
    EXPECT_EQ(a.next_rows(0, ops::kKvBlockTokens).kv.blocks.size(), 1u);
    a.advance(ops::kKvBlockTokens);
    const ops::SequenceRows rows = a.next_rows(4, 1);
    EXPECT_EQ(rows.first_row, 4);
    EXPECT_EQ(rows.position, ops::kKvBlockTokens);
    EXPECT_EQ(rows.length(), ops::kKvBlockTokens + 1);
    EXPECT_EQ(rows.kv.blocks.size(), 2u);
    const ops::SequenceRows other = b.next_rows(0, 1);
    const std::set<DevicePtr<std::byte>> distinct = {rows.kv.blocks[0], rows.kv.blocks[1],
                                                     other.kv.blocks[0]};
    EXPECT_EQ(distinct.size(), 3u);
    EXPECT_EQ(cache.free_blocks(), 2u);
  }
  EXPECT_EQ(cache.free_blocks(), 5u);
}

TEST(KvCache, RefusesWhenFullAndLosesNothing) {
  KvCache cache = cache_of(ops::kKvBlockTokens);
  {
    Sequence a(cache);
    EXPECT_THROW(a.next_rows(0, 2 * ops::kKvBlockTokens), MemoryLimitError);
    EXPECT_EQ(a.length(), 0);
  }
  EXPECT_EQ(cache.free_blocks(), 1u);
}

}  // namespace
}  // namespace dsfp4::engine
