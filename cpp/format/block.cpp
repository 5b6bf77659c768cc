#include "format/block.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "base/checked.h"
#include "dsfp4/error.h"
#include "format/scalar.h"

namespace dsfp4::format {
namespace {

constexpr float kE4m3Max = 448.0f;
constexpr float kE4m3Min = 0x1.0p-9f;
constexpr float kNvfp4Max = 6.0f * kE4m3Max;
// The smallest magnitude that rounds to an infinite float.
constexpr double kFloatOverflow = 0x1.ffffffp127;

std::uint32_t magnitude_bits(float value) {
  return std::bit_cast<std::uint32_t>(value) & 0x7fff'ffffu;
}

// Magnitudes order like their bits, which the compiler can vectorise; a NaN comes out on top.
float largest_magnitude(std::span<const float> values) {
  std::uint32_t largest = 0;
  for (const float value : values) largest = std::max(largest, magnitude_bits(value));
  return std::bit_cast<float>(largest);
}

void check_values(std::span<const float> values, std::int64_t rows, std::int64_t cols,
                  std::int64_t group) {
  if (rows < 0 || cols < 0 || checked_mul(rows, cols) != std::ssize(values)) {
    throw ParameterError("values", "must hold rows * cols values");
  }
  if (cols % group != 0) {
    throw ParameterError(
        "cols", "must be a multiple of " + std::to_string(group) + ", not " + std::to_string(cols));
  }
  if (std::isfinite(largest_magnitude(values))) return;
  const auto bad = std::ranges::find_if(values, [](float v) { return !std::isfinite(v); });
  const auto index = bad - values.begin();
  throw ParameterError("values", "the value in row " + std::to_string(index / cols) + ", column " +
                                     std::to_string(index % cols) + " is " + std::to_string(*bad) +
                                     ", but only finite values can be encoded");
}

// Packs the E2M1 codes of x / divisor, two a byte. Nothing is divided: the values are compared with
// divisor times the middles of neighbouring codes, and these products are exact.
void pack_e2m1(std::span<const float> x, double divisor, std::byte* out) {
  constexpr std::array<double, 7> kMiddles = {0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0};
  constexpr double kNever = std::numeric_limits<double>::infinity();
  std::array<double, 7> b{};
  for (std::size_t i = 0; i < b.size(); ++i) {
    // A code that would decode to infinity is not taken.
    const double above = e2m1_to_float(static_cast<std::uint8_t>(i + 1)) * divisor;
    b[i] = above < kFloatOverflow ? kMiddles[i] * divisor : kNever;
  }
  const auto code_of = [&b](float value) {
    const double m = std::fabs(value);
    // A tie goes to the even code.
    const unsigned code = unsigned{m > b[0]} + unsigned{m >= b[1]} + unsigned{m > b[2]} +
                          unsigned{m >= b[3]} + unsigned{m > b[4]} + unsigned{m >= b[5]} +
                          unsigned{m > b[6]};
    return code | (std::bit_cast<std::uint32_t>(value) >> 31 << 3);
  };
  for (std::size_t i = 0; i < x.size(); i += 2) {
    out[i / 2] = static_cast<std::byte>(code_of(x[i]) | (code_of(x[i + 1]) << 4));
  }
}

EncodedMatrix empty_matrix(WeightFormat format, std::int64_t rows, std::int64_t cols) {
  EncodedMatrix matrix{format, rows, cols, {}, {}, 1.0f};
  matrix.data.resize(data_bytes(format, rows, cols));
  matrix.scales.resize(scale_bytes(format, rows, cols));
  return matrix;
}

template <typename T>
T load(const std::byte* bytes, std::size_t index) {
  T value{};
  std::memcpy(&value, bytes + index * sizeof(T), sizeof(T));
  return value;
}

// E2M1 times its block's scale is exact, so that only the product with `factor` rounds.
template <typename ScaleOf>
void decode_fp4(const WeightView& weight, std::size_t row, std::size_t group, float factor,
                const ScaleOf& scale_of, std::span<float> out) {
  const std::byte* packed = weight.data + row * out.size() / 2;
  const std::byte* scales = weight.scales + row * out.size() / group;
  for (std::size_t first = 0; first < out.size(); first += group) {
    const float scale = scale_of(std::to_integer<std::uint8_t>(*scales++));
    for (std::size_t i = first; i < first + group; i += 2) {
      const auto pair = std::to_integer<std::uint8_t>(*packed++);
      out[i] = e2m1_to_float(pair) * scale * factor;
      out[i + 1] = e2m1_to_float(static_cast<std::uint8_t>(pair >> 4)) * scale * factor;
    }
  }
}

// The part of a matrix under one multiplier.
struct Tile {
  std::size_t row_begin, row_end, col_begin, col_end;
};

float encode_fp8_tile(std::span<const float> values, std::size_t cols, const Tile& tile,
                      std::byte* codes) {
  const std::size_t width = tile.col_end - tile.col_begin;
  float amax = 0.0f;
  for (std::size_t r = tile.row_begin; r < tile.row_end; ++r) {
    amax = std::max(amax, largest_magnitude(values.subspan(r * cols + tile.col_begin, width)));
  }
  if (amax == 0.0f) amax = kE4m3Max;
  const float scale = std::max(amax / kE4m3Max, std::numeric_limits<float>::denorm_min());
  for (std::size_t r = tile.row_begin; r < tile.row_end; ++r) {
    for (std::size_t i = r * cols + tile.col_begin; i < r * cols + tile.col_end; ++i) {
      codes[i] = static_cast<std::byte>(double_to_e4m3(static_cast<double>(values[i]) / scale));
    }
  }
  return scale;
}

}  // namespace

float nvfp4_global_scale(float amax) {
  if (!std::isfinite(amax) || amax < 0.0f) {
    throw ParameterError("amax", "must be finite and not negative, not " + std::to_string(amax));
  }
  if (amax == 0.0f) return 1.0f;
  const float scale = std::max(amax / kNvfp4Max, std::numeric_limits<float>::denorm_min());
  // Next to the largest float the quotient can round up to one whose product is infinite.
  return std::isfinite(scale * kNvfp4Max) ? scale : std::nextafter(scale, 0.0f);
}

EncodedMatrix encode_nvfp4(std::span<const float> values, std::int64_t rows, std::int64_t cols,
                           float global_scale) {
  check_values(values, rows, cols, kNvfp4Group);
  if (!std::isfinite(global_scale) || global_scale <= 0.0f) {
    throw ParameterError("global_scale",
                         "must be positive and finite, not " + std::to_string(global_scale));
  }
  EncodedMatrix matrix = empty_matrix(WeightFormat::kNvfp4, rows, cols);
  matrix.global_scale = global_scale;
  const double g = global_scale;
  const std::size_t group = kNvfp4Group;
  for (std::size_t i = 0; i < matrix.scales.size(); ++i) {
    const auto block = values.subspan(i * group, group);
    const double wanted = largest_magnitude(block) / (6.0 * g);
    const std::uint8_t code = double_to_e4m3(std::clamp<double>(wanted, kE4m3Min, kE4m3Max));
    matrix.scales[i] = std::byte{code};
    pack_e2m1(block, e4m3_to_float(code) * g, matrix.data.data() + i * group / 2);
  }
  return matrix;
}

EncodedMatrix encode_mxfp4(std::span<const float> values, std::int64_t rows, std::int64_t cols) {
  check_values(values, rows, cols, kMxfp4Group);
  EncodedMatrix matrix = empty_matrix(WeightFormat::kMxfp4, rows, cols);
  const std::size_t group = kMxfp4Group;
  for (std::size_t i = 0; i < matrix.scales.size(); ++i) {
    const auto block = values.subspan(i * group, group);
    const std::uint8_t code = mx_scale_code(largest_magnitude(block));
    matrix.scales[i] = std::byte{code};
    pack_e2m1(block, e8m0_to_float(code), matrix.data.data() + i * group / 2);
  }
  return matrix;
}

EncodedMatrix encode_fp8_block(std::span<const float> values, std::int64_t rows,
                               std::int64_t cols) {
  check_values(values, rows, cols, 1);
  EncodedMatrix matrix = empty_matrix(WeightFormat::kFp8Block, rows, cols);
  const auto height = static_cast<std::size_t>(rows);
  const auto width = static_cast<std::size_t>(cols);
  const std::size_t tile = kFp8Tile;
  std::byte* scale_at = matrix.scales.data();
  for (std::size_t r = 0; r < height; r += tile) {
    for (std::size_t c = 0; c < width; c += tile) {
      const Tile part{r, std::min(r + tile, height), c, std::min(c + tile, width)};
      const float scale = encode_fp8_tile(values, width, part, matrix.data.data());
      std::memcpy(scale_at, &scale, sizeof(scale));
      scale_at += sizeof(scale);
    }
  }
  return matrix;
}

EncodedMatrix encode_bf16(std::span<const float> values, std::int64_t rows, std::int64_t cols) {
  check_values(values, rows, cols, 1);
  EncodedMatrix matrix = empty_matrix(WeightFormat::kBF16, rows, cols);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::uint16_t code = float_to_bf16(values[i]);
    std::memcpy(matrix.data.data() + 2 * i, &code, sizeof(code));
  }
  return matrix;
}

void decode_row(const WeightView& weight, std::int64_t row, std::span<float> out) {
  if (row < 0 || row >= weight.rows) {
    throw ParameterError(
        "row", "must be 0 to " + std::to_string(weight.rows - 1) + ", not " + std::to_string(row));
  }
  if (std::ssize(out) != weight.cols) {
    throw ParameterError("out", "must hold " + std::to_string(weight.cols) + " values, not " +
                                    std::to_string(out.size()));
  }
  const auto r = static_cast<std::size_t>(row);
  const std::size_t cols = out.size();
  const std::size_t first = r * cols;
  switch (weight.format) {
    case WeightFormat::kF32:
      for (std::size_t i = 0; i < cols; ++i) out[i] = load<float>(weight.data, first + i);
      return;
    case WeightFormat::kBF16:
      for (std::size_t i = 0; i < cols; ++i) {
        out[i] = bf16_to_float(load<std::uint16_t>(weight.data, first + i));
      }
      return;
    case WeightFormat::kFp8Block: {
      const std::size_t tile = kFp8Tile;
      const std::size_t first_tile = r / tile * ceil_div(cols, tile);
      for (std::size_t i = 0; i < cols; ++i) {
        out[i] = e4m3_to_float(load<std::uint8_t>(weight.data, first + i)) *
                 load<float>(weight.scales, first_tile + i / tile);
      }
      return;
    }
    case WeightFormat::kNvfp4:
      decode_fp4(weight, r, kNvfp4Group, weight.global_scale, e4m3_to_float, out);
      return;
    case WeightFormat::kMxfp4:
      decode_fp4(weight, r, kMxfp4Group, 1.0f, e8m0_to_float, out);
      return;
  }
}

std::vector<float> decode(const WeightView& weight) {
  std::vector<float> values(static_cast<std::size_t>(weight.rows * weight.cols));
  const auto cols = static_cast<std::size_t>(weight.cols);
  for (std::int64_t row = 0; row < weight.rows; ++row) {
    decode_row(weight, row, std::span(values).subspan(static_cast<std::size_t>(row) * cols, cols));
  }
  return values;
}

}  // namespace dsfp4::format
