#include <cstdint>

#include <gtest/gtest.h>

#include "engine/prompt.h"

namespace dsfp4::engine {
namespace {

TEST(Prompt, PiecesAreEqualButForWholeBlocks) {
  EXPECT_EQ(piece_rows(5000, 4096), 2560);  // not 4096 and 904
  EXPECT_EQ(piece_rows(8192, 4096), 4096);
  EXPECT_EQ(piece_rows(8193, 4096), 2752);
  EXPECT_EQ(piece_rows(300, 256), 192);
}

TEST(Prompt, ThereAreNoMorePiecesThanNeedBe) {
  for (const std::int64_t most : {1, 60, 64, 100, 256, 4096}) {
    for (std::int64_t tokens = 1; tokens <= 3 * most + 1; tokens += most > 300 ? 97 : 1) {
      const std::int64_t rows = piece_rows(tokens, most);
      ASSERT_GE(rows, 1);
      ASSERT_LE(rows, most);
      ASSERT_EQ((tokens + rows - 1) / rows, (tokens + most - 1) / most) << tokens << " " << most;
    }
  }
}

}  // namespace
}  // namespace dsfp4::engine
