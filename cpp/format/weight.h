// How a weight matrix is stored, and a view of one that lies in memory. A weight keeps its stored
// format in every tier; only a kernel, in registers, sees decoded values.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace dsfp4::format {

enum class WeightFormat : std::uint8_t {
  kF32,
  kBF16,
  kFp8Block,  // E4M3, one FP32 multiplier for each 128x128 tile
  kNvfp4,     // E2M1 pairs (low nibble first), E4M3 scale for 16 columns, one FP32 scale
  kMxfp4,     // E2M1 pairs (low nibble first), E8M0 scale for 32 columns
};

inline constexpr std::size_t kWeightFormats = 5;

inline constexpr std::int64_t kNvfp4Group = 16;
inline constexpr std::int64_t kMxfp4Group = 32;
inline constexpr std::int64_t kFp8Tile = 128;

/// "f32", "bf16", "fp8", "nvfp4", "mxfp4".
std::string_view weight_format_name(WeightFormat format);

/// Bytes of the element data of a [rows, cols] matrix. For the FP4 formats cols is a multiple of
/// the group size (the checkpoint room refuses others).
std::size_t data_bytes(WeightFormat format, std::int64_t rows, std::int64_t cols);
/// Bytes of its block scales; 0 for kF32 and kBF16.
std::size_t scale_bytes(WeightFormat format, std::int64_t rows, std::int64_t cols);
/// Bytes of both.
std::size_t stored_bytes(WeightFormat format, std::int64_t rows, std::int64_t cols);

/// A weight matrix [rows = out features, cols = in features], row-major, in its stored format.
/// Views own nothing. `data` and `scales` may have any alignment: they point into bytes that were
/// read from a file. `Bytes` is how they are pointed to: const std::byte*, or a DevicePtr.
template <typename Bytes>
struct WeightViewOf {
  WeightFormat format = WeightFormat::kF32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  Bytes data{};
  /// kNvfp4: E4M3 [rows, cols/16]; kMxfp4: E8M0 [rows, cols/32];
  /// kFp8Block: FP32 [ceil(rows/128), ceil(cols/128)]; else null.
  Bytes scales{};
  /// kNvfp4 only: w = E2M1 * E4M3 * global_scale.
  float global_scale = 1.0f;

  template <typename Other>
    requires std::convertible_to<Bytes, Other> && (!std::same_as<Bytes, Other>)
  operator WeightViewOf<Other>() const {  // NOLINT: a plain view
    return {format, rows, cols, data, scales, global_scale};
  }
};
using WeightView = WeightViewOf<const std::byte*>;

/// Byte in `weight.scales` of the first block scale that is NaN or infinite, if there is one: every
/// value of its block would be, too. Reads all block scales.
std::optional<std::size_t> find_bad_scale(const WeightView& weight);

}  // namespace dsfp4::format
