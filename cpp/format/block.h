// The block formats NVFP4, MXFP4 and FP8 128x128: whole matrices, encode and decode.
// These are the plain definitions; kernels that multiply live in ops/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "format/weight.h"

namespace dsfp4::format {

/// A matrix that owns its stored bytes.
struct EncodedMatrix {
  WeightFormat format = WeightFormat::kF32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::vector<std::byte> data;
  std::vector<std::byte> scales;
  float global_scale = 1.0f;

  WeightView view() const { return {format, rows, cols, data.data(), scales.data(), global_scale}; }
};

/// The NVFP4 global scale of a tensor whose largest magnitude is `amax`: amax / (6 * 448), and 1
/// for an all-zero tensor; a quotient that underflows gives the smallest positive float. Throws
/// ParameterError if amax is negative, NaN or infinite.
float nvfp4_global_scale(float amax);

/// values: FP32 [rows, cols] row-major. Throws ParameterError if cols is not a multiple of 16, if
/// a value is NaN or infinite, or if global_scale is not a positive finite number.
/// block scale = E4M3(clamp(amax_block / (6 g), 2^-9, 448)); element = E2M1(x / (scale g)).
/// Every quotient is rounded once. A code whose value would be infinite as a float is not used.
/// gate and up projections share one global scale, so the caller gives it.
EncodedMatrix encode_nvfp4(std::span<const float> values, std::int64_t rows, std::int64_t cols,
                           float global_scale);
/// cols a multiple of 32; the scale is mx_scale_code of each block; an all-zero block gets 127.
EncodedMatrix encode_mxfp4(std::span<const float> values, std::int64_t rows, std::int64_t cols);
/// Any rows and cols, edge tiles are partial. Tile multiplier = amax / 448 (1 for a zero tile).
EncodedMatrix encode_fp8_block(std::span<const float> values, std::int64_t rows, std::int64_t cols);
EncodedMatrix encode_bf16(std::span<const float> values, std::int64_t rows, std::int64_t cols);

/// Decodes row `row` into `out` (cols floats). For NVFP4 the value is
/// float(E2M1 * E4M3) * global_scale, one rounding.
void decode_row(const WeightView& weight, std::int64_t row, std::span<float> out);
/// All rows, row-major.
std::vector<float> decode(const WeightView& weight);

}  // namespace dsfp4::format
