// Element types as safetensors headers name them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace dsfp4::format {

enum class DType : std::uint8_t {
  kBool,
  kU8,
  kI8,
  kI16,
  kU16,
  kI32,
  kU32,
  kI64,
  kU64,
  kF8E4M3,
  kF8E5M2,
  kF8E8M0,
  kF16,
  kBF16,
  kF32,
  kF64,
  kOther,  // a type that is not one of ours; nothing is computed from its values
};

/// The safetensors spelling: "BF16", "F8_E4M3", "U8", ...; of kOther "a type that is not known".
std::string_view dtype_name(DType dtype);
/// Empty when the name is not one of ours.
std::optional<DType> parse_dtype(std::string_view name);
/// Bytes of one element: 1, 2, 4 or 8; of kOther 1, as its bytes can be looked at one by one only.
std::size_t dtype_size(DType dtype);

}  // namespace dsfp4::format
