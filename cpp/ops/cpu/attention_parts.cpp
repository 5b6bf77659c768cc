#include "ops/cpu/attention_parts.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace dsfp4::ops::cpu {
namespace {

constexpr std::int64_t kLine = 16;  // floats in a cache line

}  // namespace

// A spare line for each array: products read whole registers past the last value.
std::size_t TaskScratch::bytes(std::int64_t floats, std::int64_t arrays) {
  return static_cast<std::size_t>(floats + 2 * arrays * kLine) * sizeof(float);
}

float* TaskScratch::take(std::int64_t floats) {
  float* const taken = next_;
  next_ += padded(floats, kLine) + kLine;
  return taken;
}

void pack_columns(const LayerKernels& kernels, const float* rows, std::int64_t row_stride,
                  std::int64_t count, std::int64_t k, float scale, std::int64_t first, float* to) {
  const std::int64_t panel = kernels.panel;
  for (std::int64_t j = 0; j < count;) {
    // As many columns as lie in one panel, up to a few: each line of the panel is written once.
    const std::int64_t column = first + j;
    const std::int64_t here = std::min({count - j, panel - column % panel, std::int64_t{16}});
    float* at = to + column / panel * panel * k + column % panel;
    const float* from = rows + j * row_stride;
    for (std::int64_t i = 0; i < k; ++i) {
      for (std::int64_t c = 0; c < here; ++c) at[c] = from[c * row_stride + i] * scale;
      at += panel;
    }
    j += here;
  }
}

void clear(const QueryTile& tile) {
  std::fill_n(tile.maximum, tile.lanes, -std::numeric_limits<float>::infinity());
  std::fill_n(tile.sum, tile.lanes, 0.0f);
  std::fill_n(tile.out, tile.queries * tile.out_stride, 0.0f);
}

void attend(const LayerKernels& kernels, const QueryTile& tile, const KeyBlock& block, float scale,
            float* scratch) {
  float* const rescale = scratch;
  float* const scores = scratch + tile.lanes;
  kernels.multiply({block.keys, block.key_stride, 1, tile.packed, kernels.panel,
                    kernels.panel * block.width, scores, tile.lanes, block.count, tile.lanes,
                    block.width});
  kernels.softmax_step({scores, tile.lanes, block.count, tile.lanes, scale, block.visible,
                        tile.maximum, tile.sum, rescale});
  for (std::int64_t q = 0; q < tile.queries; ++q) {
    if (rescale[q] == 1.0f) continue;
    float* out = tile.out + q * tile.out_stride;
    kernels.scale(out, rescale[q], out, block.value_width);
  }
  kernels.multiply_add({scores, 1, tile.lanes, block.values, block.value_stride, kernels.panel,
                        tile.out, tile.out_stride, tile.queries, block.value_width, block.count});
}

void read_cache(const LayerKernels& kernels, const KvView& kv, std::int64_t first,
                std::int64_t count, std::int64_t width, float* to) {
  const std::byte* from =
      kv_row(kv, first, static_cast<std::size_t>(width) * kv_value_bytes(kv.format));
  const std::int64_t n = count * width;
  switch (kv.format) {
    case KvFormat::kF32:
      std::memcpy(to, from, static_cast<std::size_t>(n) * sizeof(float));
      return;
    case KvFormat::kBf16:
      kernels.bf16_to_float(reinterpret_cast<const std::uint16_t*>(from), to, n);
      return;
    case KvFormat::kFp8:
      kernels.e4m3_to_float(reinterpret_cast<const std::uint8_t*>(from), kv.scale, to, n);
      return;
  }
}

void decode_weight_row(const Kernels& kernels, const LayerKernels& layer,
                       const format::WeightView& weight, std::int64_t row, float* to) {
  const std::int64_t cols = weight.cols;
  if (weight.format == format::WeightFormat::kBF16) {
    layer.bf16_to_float(reinterpret_cast<const std::uint16_t*>(weight.data + row * cols * 2), to,
                        cols);
    return;
  }
  if (weight.format != format::WeightFormat::kFp8Block) {
    kernels.decode_row(weight, row, to);
    return;
  }
  const auto* codes = reinterpret_cast<const std::uint8_t*>(weight.data) + row * cols;
  const std::int64_t tiles = padded(cols, format::kFp8Tile) / format::kFp8Tile;
  const std::byte* scales = weight.scales + row / format::kFp8Tile * tiles * 4;
  for (std::int64_t begin = 0; begin < cols; begin += format::kFp8Tile) {
    float scale;
    std::memcpy(&scale, scales + begin / format::kFp8Tile * 4, sizeof(scale));
    layer.e4m3_to_float(codes + begin, scale, to + begin,
                        std::min<std::int64_t>(format::kFp8Tile, cols - begin));
  }
}

}  // namespace dsfp4::ops::cpu
