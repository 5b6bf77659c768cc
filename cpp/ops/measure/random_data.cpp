#include "ops/measure/random_data.h"

#include <algorithm>
#include <cstring>
#include <span>

namespace dsfp4::ops::measure {
namespace {

std::uint64_t mixed(std::uint64_t x) {  // splitmix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Every eight bytes: (random & mask) | fixed.
void fill(ThreadPool& pool, std::span<std::byte> bytes, std::uint64_t seed, std::uint64_t mask,
          std::uint64_t fixed) {
  constexpr std::int64_t kWordsPerPiece = 1 << 16;
  const auto words = static_cast<std::int64_t>((bytes.size() + 7) / 8);
  pool.parallel_for(words, kWordsPerPiece, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::uint64_t word =
          (mixed((static_cast<std::uint64_t>(i) + 1) * 0x9e3779b97f4a7c15u + seed) & mask) | fixed;
      const auto at = static_cast<std::size_t>(i) * 8;
      std::memcpy(&bytes[at], &word, std::min<std::size_t>(8, bytes.size() - at));
    }
  });
}

}  // namespace

format::EncodedMatrix random_weight(ThreadPool& pool, format::WeightFormat format,
                                    std::int64_t rows, std::int64_t cols, std::uint64_t seed) {
  using format::WeightFormat;
  format::EncodedMatrix matrix{format, rows, cols, {}, {}, 1.0f / 64.0f};
  matrix.data.resize(format::data_bytes(format, rows, cols));
  matrix.scales.resize(format::scale_bytes(format, rows, cols));
  switch (format) {
    case WeightFormat::kF32:  // sign and mantissa random, exponent 2^-7
      fill(pool, matrix.data, seed, 0x807fffff807fffffu, 0x3c0000003c000000u);
      break;
    case WeightFormat::kBF16:
      fill(pool, matrix.data, seed, 0x807f807f807f807fu, 0x3c003c003c003c00u);
      break;
    case WeightFormat::kFp8Block: {  // 2^-6 to 2, no subnormals: as in models; tiles times 2^-6
      fill(pool, matrix.data, seed, 0xbfbfbfbfbfbfbfbfu, 0x0808080808080808u);
      fill(pool, matrix.scales, seed, 0, 0x3c8000003c800000u);
      break;
    }
    case WeightFormat::kNvfp4:  // scales 1 to 1.875
      fill(pool, matrix.data, seed, ~std::uint64_t{0}, 0);
      fill(pool, matrix.scales, seed + 1, 0x0707070707070707u, 0x3838383838383838u);
      break;
    case WeightFormat::kMxfp4:  // scales 2^-7 to 2^-4
      fill(pool, matrix.data, seed, ~std::uint64_t{0}, 0);
      fill(pool, matrix.scales, seed + 1, 0x0303030303030303u, 0x7878787878787878u);
      break;
  }
  return matrix;
}

std::vector<float> random_floats(std::int64_t count, std::uint64_t seed) {
  std::vector<float> values(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::uint64_t bits = mixed((i + 1) * 0x9e3779b97f4a7c15u + seed);
    values[i] = static_cast<float>(static_cast<std::int64_t>(bits)) * 0x1p-63f;
  }
  return values;
}

}  // namespace dsfp4::ops::measure
