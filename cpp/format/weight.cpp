#include "format/weight.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <span>

#include "base/checked.h"

namespace dsfp4::format {

std::string_view weight_format_name(WeightFormat format) {
  switch (format) {
    case WeightFormat::kF32:
      return "f32";
    case WeightFormat::kBF16:
      return "bf16";
    case WeightFormat::kFp8Block:
      return "fp8";
    case WeightFormat::kNvfp4:
      return "nvfp4";
    case WeightFormat::kMxfp4:
      return "mxfp4";
  }
  return "";
}

std::size_t data_bytes(WeightFormat format, std::int64_t rows, std::int64_t cols) {
  const auto count = static_cast<std::size_t>(rows * cols);
  switch (format) {
    case WeightFormat::kF32:
      return count * 4;
    case WeightFormat::kBF16:
      return count * 2;
    case WeightFormat::kFp8Block:
      return count;
    case WeightFormat::kNvfp4:
    case WeightFormat::kMxfp4:
      return count / 2;
  }
  return 0;
}

std::size_t scale_bytes(WeightFormat format, std::int64_t rows, std::int64_t cols) {
  switch (format) {
    case WeightFormat::kF32:
    case WeightFormat::kBF16:
      return 0;
    case WeightFormat::kFp8Block:
      return static_cast<std::size_t>(ceil_div(rows, kFp8Tile) * ceil_div(cols, kFp8Tile)) * 4;
    case WeightFormat::kNvfp4:
      return static_cast<std::size_t>(rows * cols / kNvfp4Group);
    case WeightFormat::kMxfp4:
      return static_cast<std::size_t>(rows * cols / kMxfp4Group);
  }
  return 0;
}

std::size_t stored_bytes(WeightFormat format, std::int64_t rows, std::int64_t cols) {
  return data_bytes(format, rows, cols) + scale_bytes(format, rows, cols);
}

namespace {

// Pieces are searched without a branch a byte first: there is hardly ever anything to find.
std::optional<std::size_t> find_byte(std::span<const std::byte> bytes, std::byte mask,
                                     std::byte bad) {
  constexpr std::size_t kPiece = 4096;
  for (std::size_t begin = 0; begin < bytes.size(); begin += kPiece) {
    const auto piece = bytes.subspan(begin, std::min(kPiece, bytes.size() - begin));
    unsigned char found = 0;
    for (const std::byte b : piece) found |= static_cast<unsigned char>((b & mask) == bad);
    if (found == 0) continue;
    const auto at = std::ranges::find_if(piece, [&](std::byte b) { return (b & mask) == bad; });
    return begin + static_cast<std::size_t>(at - piece.begin());
  }
  return std::nullopt;
}

}  // namespace

std::optional<std::size_t> find_bad_scale(const WeightView& weight) {
  const std::span bytes(weight.scales, scale_bytes(weight.format, weight.rows, weight.cols));
  switch (weight.format) {
    case WeightFormat::kF32:
    case WeightFormat::kBF16:
      break;
    case WeightFormat::kNvfp4:  // E4M3 has no infinity; NaN is all ones, of either sign
      return find_byte(bytes, std::byte{0x7f}, std::byte{0x7f});
    case WeightFormat::kMxfp4:  // E8M0: only all ones is NaN
      return find_byte(bytes, std::byte{0xff}, std::byte{0xff});
    case WeightFormat::kFp8Block:
      for (std::size_t i = 0; i < bytes.size(); i += sizeof(float)) {
        float scale = 0.0f;
        std::memcpy(&scale, bytes.data() + i, sizeof(scale));
        if (!std::isfinite(scale)) return i;
      }
      break;
  }
  return std::nullopt;
}

}  // namespace dsfp4::format
