// The order of names: as std::string compares them, and at a cost that no choice of names raises.
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "checkpoint/name_order.h"

namespace dsfp4::checkpoint {
namespace {

using Names = std::vector<std::string>;

NameOrder order_of(const Names& names, std::size_t* looks = nullptr) {
  return order_names(names.size(), [&](std::size_t i) -> const std::string& {
    if (looks != nullptr) ++*looks;
    return names[i];
  });
}

void expect_right(const Names& names) {
  std::vector<std::uint32_t> expected(names.size());
  std::iota(expected.begin(), expected.end(), 0u);
  std::stable_sort(expected.begin(), expected.end(),
                   [&](std::uint32_t a, std::uint32_t b) { return names[a] < names[b]; });
  const NameOrder got = order_of(names);
  ASSERT_EQ(got.order, expected);
  const auto twice =
      std::adjacent_find(expected.begin(), expected.end(),
                         [&](std::uint32_t a, std::uint32_t b) { return names[a] == names[b]; });
  ASSERT_EQ(got.twice.has_value(), twice != expected.end());
  if (got.twice) {
    EXPECT_EQ(*got.twice, static_cast<std::size_t>(twice - expected.begin()));
  }
  Names moved = names;
  apply_order(got.order, moved);
  Names sorted = names;
  std::sort(sorted.begin(), sorted.end());
  EXPECT_EQ(moved, sorted);
}

TEST(NameOrder, FewNames) {
  expect_right({});
  expect_right({"a"});
  expect_right({"b", "a"});
  expect_right({"", ""});
  const std::string nul(1, '\0');
  expect_right({"a" + nul + nul, "a", "a" + nul, "", nul, "a" + nul + "b", "\xff", "a\x7f"});
}

// Few letters and lengths around the steps of 7, 8 and 64 bytes: many ties, ends and prefixes.
TEST(NameOrder, AsStringsCompare) {
  std::mt19937 random(7);
  constexpr int kLengths[] = {0, 1, 6, 7, 8, 13, 14, 15, 63, 64, 65, 71, 130};
  for (int round = 0; round < 300; ++round) {
    const std::string start(random() % 140, 'x');
    const unsigned letters = 1 + random() % 3;
    Names names(1 + random() % 60);
    for (std::string& name : names) {
      if (random() % 4 != 0) name = start;
      for (int i = kLengths[random() % std::size(kLengths)]; i > 0; --i) {
        name += "a\0\xfe"[random() % letters];
      }
    }
    ASSERT_NO_FATAL_FAILURE(expect_right(names)) << "round " << round;
  }
}

// A name is looked at a few times for every 7 of its bytes, and a look reads 64 at most.
TEST(NameOrder, NoChoiceOfNamesIsSlow) {
  constexpr std::size_t kCount = 2000;
  Names far, stairs, pairs;
  for (std::size_t i = 0; i < kCount; ++i) {
    far.push_back(std::string(6400, 'a') + std::to_string(i));
    stairs.push_back(std::string(7 * (i % 300), 'a') + std::to_string(i));
    pairs.push_back((i % 2 == 0 ? "a" : "b") + std::string(640, 'c') + std::to_string(i));
  }
  for (const Names& names : {far, stairs, pairs}) {
    expect_right(names);
    std::size_t bytes = 0;
    for (const std::string& name : names) bytes += name.size();
    std::size_t looks = 0;
    order_of(names, &looks);
    EXPECT_LE(looks, 4 * (bytes / name_order::kKeyBytes + 2 * kCount));
  }
}

}  // namespace
}  // namespace dsfp4::checkpoint
