// Values that are NaN or infinite, found in the stored bytes of any element type.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "format/dtype.h"

namespace dsfp4::format {

struct Nonfinite {
  std::uint64_t count = 0;
  std::uint64_t first = 0;  // byte of the first one, from the tensor's start
};

/// Adds what `bytes`, whole elements that begin at byte `at` of a tensor, hold. Pieces come in
/// order. Integers hold none.
void find_nonfinite(DType dtype, std::span<const std::byte> bytes, std::uint64_t at,
                    Nonfinite& found);

}  // namespace dsfp4::format
