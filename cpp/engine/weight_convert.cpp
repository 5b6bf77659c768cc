#include "engine/weight_convert.h"

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "base/checked.h"
#include "format/block.h"

namespace dsfp4::engine {
namespace {

using format::EncodedMatrix;
using format::WeightFormat;
using format::WeightView;

// Rows that are encoded together: a row of FP8's tiles.
constexpr std::int64_t kBand = format::kFp8Tile;

std::vector<float> decoded(const WeightView& from, std::int64_t first, std::int64_t rows) {
  std::vector<float> values(static_cast<std::size_t>(rows * from.cols));
  for (std::int64_t r = 0; r < rows; ++r) {
    const auto cols = static_cast<std::size_t>(from.cols);
    format::decode_row(from, first + r,
                       std::span(values).subspan(static_cast<std::size_t>(r) * cols, cols));
  }
  return values;
}

// Calls body(band, first row, rows) for all bands, as many at a time as the pool has threads, and
// after(bands) between those times.
template <typename Body, typename After>
void by_bands(std::int64_t rows, ThreadPool& pool, const Poll& poll, const Body& body,
              const After& after) {
  const std::int64_t bands = ceil_div(rows, kBand);
  for (std::int64_t at = 0; at < bands; at += pool.size()) {
    if (poll) poll();
    const std::int64_t count = std::min<std::int64_t>(pool.size(), bands - at);
    pool.parallel_for(count, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t first = (at + i) * kBand;
        body(static_cast<std::size_t>(i), first, std::min(kBand, rows - first));
      }
    });
    after(static_cast<std::size_t>(count));
  }
}

float largest_magnitude(const WeightView& from, ThreadPool& pool, const Poll& poll) {
  std::vector<float> largest(static_cast<std::size_t>(pool.size()), 0.0f);
  by_bands(
      from.rows, pool, poll,
      [&](std::size_t band, std::int64_t first, std::int64_t rows) {
        for (const float value : decoded(from, first, rows)) {
          largest[band] = std::max(largest[band], std::abs(value));
        }
      },
      [](std::size_t) {});
  return *std::ranges::max_element(largest);
}

}  // namespace

std::uint64_t conversion_bytes(int threads, std::int64_t cols) {
  // A band's values as floats, and encoded.
  const auto values = static_cast<std::uint64_t>(kBand * cols);
  return static_cast<std::uint64_t>(threads) * values * (sizeof(float) + 2);
}

float convert(const WeightView& from, const format::WeightViewOf<DevicePtr<std::byte>>& to,
              ops::Device& device, ThreadPool& pool, const Poll& poll) {
  const bool nvfp4 = to.format == WeightFormat::kNvfp4;
  const float scale =
      nvfp4 ? format::nvfp4_global_scale(largest_magnitude(from, pool, poll)) : 1.0f;
  std::vector<EncodedMatrix> encoded(static_cast<std::size_t>(pool.size()));
  DevicePtr<std::byte> data = to.data;
  DevicePtr<std::byte> scales = to.scales;
  by_bands(
      from.rows, pool, poll,
      [&](std::size_t band, std::int64_t first, std::int64_t rows) {
        const std::vector<float> values = decoded(from, first, rows);
        encoded[band] = nvfp4 ? format::encode_nvfp4(values, rows, from.cols, scale)
                              : format::encode_fp8_block(values, rows, from.cols);
      },
      [&](std::size_t bands) {
        for (std::size_t i = 0; i < bands; ++i) {
          const EncodedMatrix& band = encoded[i];
          device.upload(band.data.data(), data, band.data.size());
          device.upload(band.scales.data(), scales, band.scales.size());
          data = data + static_cast<std::ptrdiff_t>(band.data.size());
          scales = scales + static_cast<std::ptrdiff_t>(band.scales.size());
        }
      });
  return scale;
}

}  // namespace dsfp4::engine
