// Sorting names that strangers chose: no order of them and no common beginning makes it slow.
#pragma once

#include <algorithm>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

namespace dsfp4::checkpoint {

/// Items by name; those of one name in the order in which they came.
struct NameOrder {
  std::vector<std::uint32_t> order;
  /// If a name is there twice: the first place in `order` whose name is that of the next.
  std::optional<std::size_t> twice;
};

namespace name_order {

// Up to seven bytes of a name, then how many there are: compares as the bytes do.
struct Key {
  std::uint64_t bytes = 0;
  std::uint32_t item = 0;

  auto operator<=>(const Key&) const = default;
};

inline constexpr std::size_t kKeyBytes = 7;
inline constexpr std::size_t kAhead = 8;  // names lie all over memory: they are asked for in time
inline constexpr std::size_t kSkipBytes = 64;  // at a time, or a name apart would cost all of it

inline std::uint64_t key_of(std::string_view rest) {
  std::uint64_t key = 0;
  for (std::size_t i = 0; i < kKeyBytes; ++i) {
    key = key << 8 | (i < rest.size() ? static_cast<unsigned char>(rest[i]) : 0u);
  }
  return key << 8 | std::min(rest.size(), kKeyBytes + 1);
}

// Whether names of this key go on after it.
inline bool goes_on(std::uint64_t key) { return (key & 0xff) > kKeyBytes; }

inline std::size_t common_length(std::string_view a, std::string_view b) {
  const std::size_t both = std::min(a.size(), b.size());
  std::size_t i = 0;
  while (i + 8 <= both && std::memcmp(a.data() + i, b.data() + i, 8) == 0) i += 8;
  while (i < both && a[i] == b[i]) ++i;
  return i;
}

}  // namespace name_order

/// `name_of(i)` is the name of item i. Reads each byte of the names a few times at most: keys are
/// compared where they lie side by side, and what the names of a group share is skipped.
template <typename NameOf>
NameOrder order_names(std::size_t count, const NameOf& name_of) {
  using name_order::Key;
  struct Group {
    std::size_t begin, end, skip;  // these names share their first `skip` bytes
  };
  std::vector<Key> keys(count);
  for (std::size_t i = 0; i < count; ++i) keys[i].item = static_cast<std::uint32_t>(i);
  NameOrder result;
  std::vector<Group> groups;
  if (count > 1) groups.push_back({0, count, 0});
  while (!groups.empty()) {
    auto [begin, end, skip] = groups.back();
    groups.pop_back();
    const std::string_view first = std::string_view(name_of(keys[begin].item)).substr(skip);
    std::size_t common = std::min(first.size(), name_order::kSkipBytes);
    for (std::size_t i = begin + 1; i < end && common > 0; ++i) {
      const std::size_t soon = std::min(i + name_order::kAhead, end - 1);
      __builtin_prefetch(std::string_view(name_of(keys[soon].item)).data() + skip);
      const std::string_view other = std::string_view(name_of(keys[i].item)).substr(skip);
      common = name_order::common_length(first.substr(0, common), other);
    }
    skip += common;
    if (common == name_order::kSkipBytes) {
      groups.push_back({begin, end, skip});
      continue;
    }
    for (std::size_t i = begin; i < end; ++i) {
      keys[i].bytes = name_order::key_of(std::string_view(name_of(keys[i].item)).substr(skip));
    }
    const std::span<Key> group(keys.data() + begin, end - begin);
    if (!std::is_sorted(group.begin(), group.end())) std::sort(group.begin(), group.end());
    for (std::size_t i = begin; i < end;) {
      std::size_t next = i + 1;
      while (next < end && keys[next].bytes == keys[i].bytes) ++next;
      if (next - i > 1 && name_order::goes_on(keys[i].bytes)) {
        groups.push_back({i, next, skip + name_order::kKeyBytes});
      } else if (next - i > 1) {
        result.twice = std::min(i, result.twice.value_or(i));
      }
      i = next;
    }
  }
  result.order.reserve(count);
  for (const Key& key : keys) result.order.push_back(key.item);
  return result;
}

/// Brings the items into that order, without a second array of them. Takes the order apart.
template <typename Item>
void apply_order(std::vector<std::uint32_t> order, std::vector<Item>& items) {
  for (std::size_t start = 0; start < order.size(); ++start) {
    if (order[start] == start) continue;
    Item held = std::move(items[start]);
    std::size_t hole = start;
    for (std::size_t from = order[hole]; from != start; from = order[hole]) {
      items[hole] = std::move(items[from]);
      order[hole] = static_cast<std::uint32_t>(hole);
      hole = from;
    }
    items[hole] = std::move(held);
    order[hole] = static_cast<std::uint32_t>(hole);
  }
}

}  // namespace dsfp4::checkpoint
