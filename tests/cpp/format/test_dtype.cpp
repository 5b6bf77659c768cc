#include <gtest/gtest.h>

#include "format/dtype.h"

namespace dsfp4::format {
namespace {

TEST(DType, NamesAndSizesOfSafetensors) {
  const std::pair<const char*, std::size_t> expected[] = {
      {"BOOL", 1},    {"U8", 1},      {"I8", 1},  {"I16", 2}, {"U16", 2},  {"I32", 4},
      {"U32", 4},     {"I64", 8},     {"U64", 8}, {"F16", 2}, {"BF16", 2}, {"F8_E4M3", 1},
      {"F8_E5M2", 1}, {"F8_E8M0", 1}, {"F32", 4}, {"F64", 8}};
  for (const auto& [name, size] : expected) {
    const auto dtype = parse_dtype(name);
    ASSERT_TRUE(dtype.has_value()) << name;
    EXPECT_EQ(dtype_name(*dtype), name);
    EXPECT_EQ(dtype_size(*dtype), size) << name;
  }
  EXPECT_FALSE(parse_dtype("bf16").has_value());
  EXPECT_FALSE(parse_dtype("").has_value());
}

}  // namespace
}  // namespace dsfp4::format
