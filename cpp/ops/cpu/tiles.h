// Matrix products in tiles of 16 rows x 16 tokens, for prefill. Their sums run in another order
// than Matmul's, so which of the two computes a product is decided by the phase, never by a size.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ops/cpu/matmul.h"

namespace dsfp4::ops::cpu {

inline constexpr std::int64_t kTileTokens = 16;

struct Tiles {
  const char* name;
  std::size_t scratch_bytes;
  std::int64_t most_rows;  // of one call
  /// Bytes of a group of 16 tokens.
  std::size_t (*group_bytes)(std::int64_t cols);
  /// Makes a group of up to 16 packed rows (packed for the BF16 products of the same weight;
  /// `index` null: 0, 1, 2, ...); missing tokens are zeros.
  void (*group)(const std::byte* x, std::size_t x_stride, const std::int32_t* index,
                std::int64_t tokens, std::int64_t cols, std::byte* out);
  /// As Matmul::multiply, but product.x points at groups, x_stride is group_bytes, and x_index is
  /// not used. Any format but F32; at most most_rows rows.
  void (*multiply)(const Product& product, std::byte* scratch);
};

extern const Tiles kTilesAmx;

/// Whether the CPU has AMX BF16 and the system lets this process use it. Asks the system once; if
/// it refuses, that is logged.
bool amx_usable();

}  // namespace dsfp4::ops::cpu
