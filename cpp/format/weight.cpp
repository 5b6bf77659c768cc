#include "format/weight.h"

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

}  // namespace dsfp4::format
