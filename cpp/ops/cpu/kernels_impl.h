// The bodies of the kernel tables, compiled once for each instruction set by the files that include
// this one: rows decoded to FP32 as their definitions say, for the parts of attention that have no
// decoder of their own.
//
// Everything here has internal linkage and calls no inline function from elsewhere: a shared inline
// function compiled here could be linked into code that runs on older CPUs.
#include <cstdint>
#include <cstring>

#include "ops/cpu/kernels.h"

namespace dsfp4::ops::cpu {
namespace {

using format::WeightFormat;
using format::WeightView;

struct Fp4Pairs {
  float value[256][2];
};
constexpr Fp4Pairs make_fp4_pairs() {
  constexpr float kMagnitude[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  Fp4Pairs pairs{};
  for (int byte = 0; byte < 256; ++byte) {
    for (int half = 0; half < 2; ++half) {
      const int code = (byte >> (4 * half)) & 15;
      pairs.value[byte][half] = (code & 8) != 0 ? -kMagnitude[code & 7] : kMagnitude[code & 7];
    }
  }
  return pairs;
}
constexpr Fp4Pairs kFp4Pairs = make_fp4_pairs();

struct Fp8Values {
  float value[256];
};
constexpr Fp8Values make_e4m3_values() {
  Fp8Values table{};
  for (int code = 0; code < 256; ++code) {
    const int exponent = (code >> 3) & 15;
    const int mantissa = code & 7;
    float value = static_cast<float>(exponent == 0 ? mantissa : 8 + mantissa) / 512.0f;
    for (int e = 1; e < exponent; ++e) value *= 2.0f;
    if ((code & 127) == 127) value = __builtin_nanf("");
    table.value[code] = (code & 128) != 0 ? -value : value;
  }
  return table;
}
constexpr Fp8Values kE4m3Values = make_e4m3_values();

float e8m0_value(std::uint8_t code) {
  if (code == 255) return __builtin_nanf("");
  const std::uint32_t bits = code == 0 ? 0x00400000u : static_cast<std::uint32_t>(code) << 23;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// out[group] = pairs * scale, one group of `size` columns at a time.
template <int size>
void decode_fp4_group(const std::uint8_t* packed, float scale, float* out) {
  float values[size];
  for (int i = 0; i < size / 2; ++i) {
    std::memcpy(values + 2 * i, kFp4Pairs.value[packed[i]], 2 * sizeof(float));
  }
  for (int i = 0; i < size; ++i) out[i] = values[i] * scale;
}

void e4m3_to_float(const std::uint8_t* x, float scale, float* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) y[i] = kE4m3Values.value[x[i]] * scale;
}

void decode_fp8_row(const WeightView& weight, std::int64_t row, float* out) {
  const auto* codes = reinterpret_cast<const std::uint8_t*>(weight.data) + row * weight.cols;
  const std::int64_t tiles = (weight.cols + format::kFp8Tile - 1) / format::kFp8Tile;
  const std::byte* scales = weight.scales + row / format::kFp8Tile * tiles * 4;
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    float scale;
    std::memcpy(&scale, scales + tile * 4, sizeof(scale));
    const std::int64_t begin = tile * format::kFp8Tile;
    const std::int64_t end =
        begin + format::kFp8Tile < weight.cols ? begin + format::kFp8Tile : weight.cols;
    e4m3_to_float(codes + begin, scale, out + begin, end - begin);
  }
}

void bf16_to_float(const std::uint16_t* x, float* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    std::uint16_t code;
    std::memcpy(&code, x + i, sizeof(code));
    const std::uint32_t bits = static_cast<std::uint32_t>(code) << 16;
    std::memcpy(y + i, &bits, sizeof(bits));
  }
}

void decode_row(const WeightView& weight, std::int64_t row, float* out) {
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(weight.data);
  const auto* scales = reinterpret_cast<const std::uint8_t*>(weight.scales);
  const std::int64_t cols = weight.cols;
  switch (weight.format) {
    case WeightFormat::kF32:
      std::memcpy(out, bytes + row * cols * 4, static_cast<std::size_t>(cols) * 4);
      return;
    case WeightFormat::kBF16:
      bf16_to_float(reinterpret_cast<const std::uint16_t*>(bytes + row * cols * 2), out, cols);
      return;
    case WeightFormat::kFp8Block:
      decode_fp8_row(weight, row, out);
      return;
    case WeightFormat::kNvfp4:
      for (std::int64_t i = 0; i < cols; i += format::kNvfp4Group) {
        const std::int64_t at = row * cols + i;
        decode_fp4_group<format::kNvfp4Group>(
            bytes + at / 2, kE4m3Values.value[scales[at / format::kNvfp4Group]], out + i);
      }
      return;
    case WeightFormat::kMxfp4:
      for (std::int64_t i = 0; i < cols; i += format::kMxfp4Group) {
        const std::int64_t at = row * cols + i;
        decode_fp4_group<format::kMxfp4Group>(
            bytes + at / 2, e8m0_value(scales[at / format::kMxfp4Group]), out + i);
      }
      return;
  }
}

void round_to_bf16(const float* x, float* y, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    bits = nan ? bits | 0x00400000u : rounded;
    std::memcpy(y + i, &bits, sizeof(bits));
  }
}

constexpr Kernels make_kernels(const char* isa) noexcept {
  return {isa, decode_row, round_to_bf16};
}

}  // namespace
}  // namespace dsfp4::ops::cpu
