// FP32 products, written once in vector types and compiled once for each instruction set by the
// files that include this one. They define, before the include:
//   DSFP4_LANES, DSFP4_ROWS, DSFP4_TOKENS   floats of a register; the tile in registers
//   DSFP4_CHUNK, DSFP4_GROUPS   columns, and tiles of rows, that are decoded at a time
//   decode_bf16(codes, n, out), decode_e4m3(codes, n, scale, out), decode_nvfp4(packed, scales, n,
//   out), decode_mxfp4(packed, scales, n, out)   n columns of one row to floats
//
// Packed activations: FP32 in order, zeros up to a multiple of 16. Weights are decoded to FP32 (the
// global scale of NVFP4 left out, so E2M1 times E4M3 is exact) in scratch.
#include <cstring>

#include "ops/cpu/matmul_blocked.h"
#include "ops/cpu/multiply_add.h"

namespace dsfp4::ops::cpu {
namespace {

constexpr std::int64_t kLanes = DSFP4_LANES;
constexpr std::int64_t kPad = 16;  // floats

inline std::int64_t padded(std::int64_t cols) { return (cols + kPad - 1) / kPad * kPad; }

// Not a multiple of 4096, where the rows of several tokens would meet in the same lines of a cache.
std::size_t packed_f32_bytes(std::int64_t cols) {
  const auto bytes = static_cast<std::size_t>(padded(cols)) * sizeof(float);
  return bytes % 4096 == 0 ? bytes + 64 : bytes;
}

// Rounding to BF16 would gain nothing here.
void pack_f32(const float* x, std::int64_t cols, bool /*round*/, std::byte* out) {
  auto* y = reinterpret_cast<float*>(out);
  if (cols > 0) std::memcpy(y, x, static_cast<std::size_t>(cols) * sizeof(float));
  for (std::int64_t i = cols; i < padded(cols); ++i) y[i] = 0.0f;
}

struct F32 {
  // Aligned like a float: packed rows and scratch are on 64 bytes, but nothing is lost by it.
  using Sum = float
      __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float)), may_alias));
  static constexpr int kRows = DSFP4_ROWS;
  static constexpr int kTokens = DSFP4_TOKENS;
  static constexpr std::int64_t kChunk = DSFP4_CHUNK;
  static constexpr int kGroups = DSFP4_GROUPS;
  struct Weights {
    float value[kRows][kChunk];
  };

  static void decode(const format::WeightView& w, std::int64_t row, int index, std::int64_t begin,
                     std::int64_t end, Weights& weights) {
    float* out = weights.value[index];
    const std::int64_t n = end - begin;
    const std::int64_t at = row * w.cols + begin;
    const auto* data = reinterpret_cast<const std::uint8_t*>(w.data);
    const auto* scales = reinterpret_cast<const std::uint8_t*>(w.scales);
    switch (w.format) {
      case format::WeightFormat::kF32:
        std::memcpy(out, data + at * 4, static_cast<std::size_t>(n) * sizeof(float));
        break;
      case format::WeightFormat::kBF16:
        decode_bf16(data + at * 2, n, out);
        break;
      case format::WeightFormat::kFp8Block: {
        const std::int64_t tiles = (w.cols + format::kFp8Tile - 1) / format::kFp8Tile;
        const std::int64_t first = row / format::kFp8Tile * tiles + begin / format::kFp8Tile;
        for (std::int64_t i = 0; i < n; i += format::kFp8Tile) {
          float scale;
          std::memcpy(&scale, scales + (first + i / format::kFp8Tile) * 4, sizeof(scale));
          decode_e4m3(data + at + i, lesser(format::kFp8Tile, n - i), scale, out + i);
        }
        break;
      }
      case format::WeightFormat::kNvfp4:
        decode_nvfp4(data + at / 2, scales + at / format::kNvfp4Group, n, out);
        break;
      case format::WeightFormat::kMxfp4:
        decode_mxfp4(data + at / 2, scales + at / format::kMxfp4Group, n, out);
        break;
    }
    for (std::int64_t i = n; i < padded(n); ++i) out[i] = 0.0f;
  }

  template <int count>
  static void tile(const Weights& w, std::int64_t begin, std::int64_t end,
                   const std::byte* const* rows, Sum* sums) {
    const float* x[count];
    Sum sum[count][kRows];
    for (int t = 0; t < count; ++t) {
      x[t] = reinterpret_cast<const float*>(rows[t]) + begin;
      for (int r = 0; r < kRows; ++r) sum[t][r] = sums[t * kRows + r];
    }
    const std::int64_t n = padded(end - begin);
    for (std::int64_t i = 0; i < n; i += kLanes) {
      Sum weights[kRows];
      for (int r = 0; r < kRows; ++r) {
        weights[r] = *reinterpret_cast<const Sum*>(w.value[r] + i);
      }
      for (int t = 0; t < count; ++t) {
        const Sum values = *reinterpret_cast<const Sum*>(x[t] + i);
        for (int r = 0; r < kRows; ++r) sum[t][r] = multiply_add(weights[r], values, sum[t][r]);
      }
    }
    for (int t = 0; t < count; ++t) {
      for (int r = 0; r < kRows; ++r) sums[t * kRows + r] = sum[t][r];
    }
  }

  static float total(const Sum& sum) {
    float lanes[kLanes];
    std::memcpy(lanes, &sum, sizeof(lanes));
    for (std::int64_t width = kLanes / 2; width > 0; width /= 2) {
      for (std::int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    return lanes[0];
  }
};

}  // namespace
}  // namespace dsfp4::ops::cpu
