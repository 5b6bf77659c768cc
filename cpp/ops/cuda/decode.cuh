// Single stored values to floats, for the plain kernels; the fast ones decode whole words.
#pragma once

#include "ops/cuda/common.cuh"

namespace dsfp4::ops::cuda {

using format::WeightFormat;
using format::WeightView;

/// 0 .5 1 1.5 2 3 4 6, bit 3 is the sign.
__device__ __forceinline__ float e2m1_value(unsigned code) {
  const unsigned exponent = (code >> 1) & 3u;
  const unsigned fraction = code & 1u;
  const unsigned bits =
      exponent == 0 ? fraction * 0x3f000000u : ((exponent + 126u) << 23) | (fraction << 22);
  return __uint_as_float(bits | ((code & 8u) << 28));
}

/// As half-precision bits the code is 2^-8 times its value.
__device__ __forceinline__ float e4m3_value(unsigned code) {
  const unsigned magnitude = code & 0x7fu;
  if (magnitude == 0x7fu) return __uint_as_float(0x7fffffffu);
  const unsigned short bits = static_cast<unsigned short>(((code & 0x80u) << 8) | (magnitude << 7));
  return __half2float(__ushort_as_half(bits)) * 256.0f;
}

__device__ __forceinline__ float e8m0_value(unsigned code) {
  if (code == 255u) return __uint_as_float(0x7fffffffu);
  return __uint_as_float(code == 0 ? 0x00400000u : code << 23);
}

/// A float that may lie at any byte.
__device__ __forceinline__ float float_at(const std::byte* bytes) {
  const auto* b = reinterpret_cast<const unsigned char*>(bytes);
  return __uint_as_float(b[0] | (b[1] << 8) | (b[2] << 16) | (static_cast<unsigned>(b[3]) << 24));
}

/// Element (row, col) without NVFP4's global scale.
template <WeightFormat kFormat>
__device__ __forceinline__ float weight_value(const WeightView& weight, std::int64_t row,
                                              std::int64_t col) {
  const auto* data = reinterpret_cast<const unsigned char*>(weight.data);
  const auto* scales = reinterpret_cast<const unsigned char*>(weight.scales);
  const std::int64_t at = row * weight.cols + col;
  if constexpr (kFormat == WeightFormat::kF32) {
    return float_at(weight.data + at * 4);
  } else if constexpr (kFormat == WeightFormat::kBF16) {
    return __uint_as_float((data[at * 2] | (static_cast<unsigned>(data[at * 2 + 1]) << 8)) << 16);
  } else if constexpr (kFormat == WeightFormat::kFp8Block) {
    constexpr std::int64_t kTile = ::dsfp4::format::kFp8Tile;
    const std::int64_t tiles = (weight.cols + kTile - 1) / kTile;
    const std::int64_t tile = row / kTile * tiles + col / kTile;
    return e4m3_value(data[at]) * float_at(weight.scales + tile * 4);
  } else {
    const unsigned code = (data[at / 2] >> (4 * (at & 1))) & 15u;
    if constexpr (kFormat == WeightFormat::kNvfp4) {
      return e2m1_value(code) * e4m3_value(scales[at / ::dsfp4::format::kNvfp4Group]);
    } else {
      return e2m1_value(code) * e8m0_value(scales[at / ::dsfp4::format::kMxfp4Group]);
    }
  }
}

__device__ __forceinline__ float weight_value(const WeightView& weight, std::int64_t row,
                                              std::int64_t col) {
  switch (weight.format) {
    case WeightFormat::kF32:
      return weight_value<WeightFormat::kF32>(weight, row, col);
    case WeightFormat::kBF16:
      return weight_value<WeightFormat::kBF16>(weight, row, col);
    case WeightFormat::kFp8Block:
      return weight_value<WeightFormat::kFp8Block>(weight, row, col);
    case WeightFormat::kNvfp4:
      return weight_value<WeightFormat::kNvfp4>(weight, row, col);
    case WeightFormat::kMxfp4:
      return weight_value<WeightFormat::kMxfp4>(weight, row, col);
  }
  return 0.0f;
}

/// NVFP4's global scale; 1 for the others.
__host__ __device__ inline float epilogue_scale(const WeightView& weight) {
  return weight.format == WeightFormat::kNvfp4 ? weight.global_scale : 1.0f;
}

}  // namespace dsfp4::ops::cuda
