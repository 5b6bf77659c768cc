// Random values and weights for the tests of ops.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "format/block.h"
#include "ops/ops.h"

namespace dsfp4::ops::testing {

inline std::vector<float> random_values(std::int64_t count, std::uint32_t seed) {
  std::mt19937 bits(seed);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& v : values) {
    v = static_cast<float>(static_cast<std::int32_t>(bits()) * 0x1.0p-31 +
                           static_cast<std::int32_t>(bits()) * 0x1.0p-31);
  }
  return values;
}

inline format::EncodedMatrix random_weight(format::WeightFormat format, std::int64_t rows,
                                           std::int64_t cols, std::uint32_t seed) {
  const std::vector<float> values = random_values(rows * cols, seed);
  switch (format) {
    case format::WeightFormat::kF32: {
      format::EncodedMatrix matrix{format, rows, cols, {}, {}, 1.0f};
      matrix.data.resize(values.size() * sizeof(float));
      std::copy_n(reinterpret_cast<const std::byte*>(values.data()), matrix.data.size(),
                  matrix.data.begin());
      return matrix;
    }
    case format::WeightFormat::kBF16:
      return format::encode_bf16(values, rows, cols);
    case format::WeightFormat::kFp8Block:
      return format::encode_fp8_block(values, rows, cols);
    case format::WeightFormat::kNvfp4:
      return format::encode_nvfp4(values, rows, cols, format::nvfp4_global_scale(2.0f));
    case format::WeightFormat::kMxfp4:
      return format::encode_mxfp4(values, rows, cols);
  }
  return {};
}

inline constexpr format::WeightFormat kAllFormats[] = {
    format::WeightFormat::kF32, format::WeightFormat::kBF16, format::WeightFormat::kFp8Block,
    format::WeightFormat::kNvfp4, format::WeightFormat::kMxfp4};

/// A matrix that owns its values.
struct OwnedMatrix {
  OwnedMatrix(std::int64_t rows, std::int64_t cols)
      : rows_(rows), cols_(cols), values(static_cast<std::size_t>(rows * cols), -777.0f) {}
  OwnedMatrix(std::int64_t rows, std::int64_t cols, std::uint32_t seed)
      : rows_(rows), cols_(cols), values(random_values(rows * cols, seed)) {}

  Matrix view() { return {values.data(), rows_, cols_, cols_}; }

  std::int64_t rows_, cols_;
  std::vector<float> values;
};

/// ||a - b|| / ||b||.
inline double relative_error(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0.0;
  double norm = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
    norm += static_cast<double>(b[i]) * b[i];
  }
  return norm == 0.0 ? std::sqrt(difference) : std::sqrt(difference / norm);
}

}  // namespace dsfp4::ops::testing
