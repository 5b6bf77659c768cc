#include "format/scalar.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <string>

#include "dsfp4/error.h"

namespace dsfp4::format {
namespace {

constexpr std::array<float, 16> kE2m1 = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                         -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

constexpr float decode_e4m3_code(std::uint32_t code) {
  const std::uint32_t sign = (code & 0x80u) << 24;
  const std::uint32_t exponent = (code >> 3) & 15u;
  const std::uint32_t mantissa = code & 7u;
  if ((code & 0x7fu) == 0x7fu) return std::bit_cast<float>(sign | 0x7fc00000u);
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-9f;
    return sign != 0 ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | ((exponent - 7 + 127) << 23) | (mantissa << 20));
}

constexpr std::array<float, 256> kE4m3 = [] {
  std::array<float, 256> table{};
  for (std::uint32_t code = 0; code < 256; ++code) table[code] = decode_e4m3_code(code);
  return table;
}();

}  // namespace

float bf16_to_float(std::uint16_t code) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(code) << 16);
}

std::uint16_t float_to_bf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (std::isnan(value)) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

float e4m3_to_float(std::uint8_t code) { return kE4m3[code]; }

std::uint8_t float_to_e4m3(float value) { return double_to_e4m3(value); }

std::uint8_t double_to_e4m3(double value) {
  const auto sign = static_cast<std::uint8_t>(std::signbit(value) ? 0x80 : 0);
  if (std::isnan(value)) return static_cast<std::uint8_t>(sign | 0x7f);
  const double magnitude = std::min(std::fabs(value), 448.0);
  // Below 2^-6 the steps are 2^-9, the last bit of a double at 2^43: the sum rounds to it. From
  // 2^-6 on, three bits of the mantissa stay; a carry goes up into the exponent, as it should.
  const auto subnormal = std::bit_cast<std::uint64_t>(magnitude + 0x1p43) & 15u;
  const auto bits = std::bit_cast<std::uint64_t>(magnitude);
  const std::uint64_t kept = (bits + 0xffff'ffff'ffffu + ((bits >> 49) & 1u)) >> 49;
  const std::uint64_t normal = kept - ((1023 - 7) << 3);
  return static_cast<std::uint8_t>(sign | (magnitude < 0x1p-6 ? subnormal : normal));
}

float e2m1_to_float(std::uint8_t code) { return kE2m1[code & 15u]; }

std::uint8_t float_to_e2m1(float value) {
  if (!std::isfinite(value)) {
    throw ParameterError(
        "value", "E2M1 has no NaN and no infinity, but the value is " + std::to_string(value));
  }
  const float m = std::fabs(value);
  // Each bound is the middle of two neighbours; a tie goes to the even code.
  const int code = (m > 0.25f) + (m >= 0.75f) + (m > 1.25f) + (m >= 1.75f) + (m > 2.5f) +
                   (m >= 3.5f) + (m > 5.0f);
  return static_cast<std::uint8_t>((std::signbit(value) ? 8 : 0) | code);
}

float e8m0_to_float(std::uint8_t code) {
  if (code == 0) return 0x1p-127f;
  if (code == 255) return std::numeric_limits<float>::quiet_NaN();
  return std::bit_cast<float>(static_cast<std::uint32_t>(code) << 23);
}

std::uint8_t mx_scale_code(float amax) {
  if (!std::isfinite(amax) || amax < 0.0f) {
    throw ParameterError("amax", "must be finite and not negative, not " + std::to_string(amax));
  }
  if (amax == 0.0f) return 127;
  // amax = m * 2^e with m in [1, 2) and 6 = 1.5 * 2^2: amax <= 6 * 2^k from k = e - 2 on if
  // m <= 1.5, else from k = e - 1 on. With both exponents biased, the code is e - 2 or e - 1.
  const auto bits = std::bit_cast<std::uint32_t>(amax);
  const int exponent = static_cast<int>(bits >> 23);
  const bool above_half = (bits & 0x7fffffu) > 0x400000u;
  return static_cast<std::uint8_t>(std::max(exponent - (above_half ? 1 : 2), 0));
}

}  // namespace dsfp4::format
