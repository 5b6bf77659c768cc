#include "engine/bench_weights.h"

#include <algorithm>
#include <vector>

#include "format/weight.h"

namespace dsfp4::engine {
namespace {

using format::WeightFormat;

constexpr std::size_t kScaleBytes = std::size_t{64} << 20;  // of each kind
// The kinds, in this order: E4M3, E8M0, FP32.
constexpr std::size_t kKinds = 3;

std::size_t kind_of(WeightFormat format) {
  if (format == WeightFormat::kNvfp4) return 0;
  return format == WeightFormat::kMxfp4 ? 1 : 2;
}

}  // namespace

RandomWeights::RandomWeights(ops::Device& device, std::mt19937& random)
    : codes_(kBytes, "the benchmark's weights", device.memory()),
      scales_(kKinds * kScaleBytes, "the benchmark's scales", device.memory()),
      codes_base_(codes_.take(kBytes)),
      scales_base_(scales_.take(kKinds * kScaleBytes)) {
  constexpr std::size_t kPiece = std::size_t{32} << 20;
  std::vector<std::uint32_t> words(kPiece / 4);
  for (auto& word : words) word = random() & 0xbfffbfffu;  // finite as BF16, too
  for (std::size_t at = 0; at < kBytes; at += kPiece) {
    device.upload(words.data(), codes_base_ + static_cast<std::ptrdiff_t>(at),
                  std::min(kPiece, kBytes - at));
  }
  std::vector<std::uint8_t> codes(kScaleBytes);
  for (auto& code : codes) code = static_cast<std::uint8_t>(0x28 + random() % 16);
  device.upload(codes.data(), scales_base_, kScaleBytes);
  for (auto& code : codes) code = static_cast<std::uint8_t>(118 + random() % 4);
  device.upload(codes.data(), scales_base_ + kScaleBytes, kScaleBytes);
  std::vector<float> floats(kScaleBytes / 4);
  for (auto& v : floats) v = 1e-3f * static_cast<float>(1 + random() % 8);
  device.upload(floats.data(), scales_base_ + 2 * kScaleBytes, kScaleBytes);
}

ops::WeightView RandomWeights::next(WeightFormat format, std::int64_t rows, std::int64_t cols) {
  const std::size_t data = memory::Arena::padded(format::data_bytes(format, rows, cols));
  const std::size_t scale = memory::Arena::padded(format::scale_bytes(format, rows, cols));
  if (codes_at_ + data > kBytes) codes_at_ = 0;
  if (scales_at_ + scale > kScaleBytes) scales_at_ = 0;
  const std::size_t scales = kind_of(format) * kScaleBytes + scales_at_;
  const ops::WeightView view{format,
                             rows,
                             cols,
                             codes_base_ + static_cast<std::ptrdiff_t>(codes_at_),
                             scales_base_ + static_cast<std::ptrdiff_t>(scales),
                             1e-2f};
  codes_at_ += data;
  scales_at_ += scale;
  return view;
}

}  // namespace dsfp4::engine
