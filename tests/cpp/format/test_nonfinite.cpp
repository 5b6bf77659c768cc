#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include <gtest/gtest.h>

#include "format/nonfinite.h"

namespace dsfp4::format {
namespace {

// Every code of a type of `size` bytes whose upper two bytes vary.
std::vector<std::byte> codes(std::size_t size) {
  const std::size_t count = size == 1 ? 256 : 65536;
  std::vector<std::byte> bytes(count * size);
  for (std::size_t i = 0; i < count; ++i) {
    const auto code = static_cast<std::uint16_t>(i);
    std::memcpy(bytes.data() + i * size + (size > 2 ? size - 2 : 0), &code, size == 1 ? 1 : 2);
  }
  return bytes;
}

TEST(Nonfinite, CountsAndFirstOfEveryType) {
  struct Expected {
    DType dtype;
    std::uint64_t count, first;  // of codes(); the first as an element
  };
  constexpr std::array<Expected, 9> kAll = {{{DType::kF8E4M3, 2, 0x7F},
                                             {DType::kF8E5M2, 8, 0x7C},
                                             {DType::kF8E8M0, 1, 0xFF},
                                             {DType::kF16, 2048, 0x7C00},
                                             {DType::kBF16, 256, 0x7F80},
                                             {DType::kF32, 256, 0x7F80},
                                             {DType::kF64, 32, 0x7FF0},
                                             {DType::kU8, 0, 0},
                                             {DType::kI32, 0, 0}}};
  for (const auto& [dtype, count, first] : kAll) {
    const std::size_t size = dtype_size(dtype);
    const std::vector<std::byte> bytes = codes(size);
    Nonfinite found;
    find_nonfinite(dtype, bytes, 1000 * size, found);
    EXPECT_EQ(found.count, count) << dtype_name(dtype);
    if (count == 0) continue;
    EXPECT_EQ(found.first, (1000 + first) * size) << dtype_name(dtype);
    find_nonfinite(dtype, bytes, 2'000'000, found);  // a later piece adds, the first one stays
    EXPECT_EQ(found.count, 2 * count);
    EXPECT_EQ(found.first, (1000 + first) * size);
  }
}

}  // namespace
}  // namespace dsfp4::format
