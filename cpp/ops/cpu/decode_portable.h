// Decoders of one row to FP32 that run on every CPU, for the files that include
// matmul_f32_impl.h; internal linkage, like there.
#include <cstdint>
#include <cstring>

namespace dsfp4::ops::cpu {
namespace {

struct Fp4Pairs {
  float value[256][2];
};
constexpr Fp4Pairs kPortableFp4 = [] {
  constexpr float kMagnitude[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  Fp4Pairs pairs{};
  for (int byte = 0; byte < 256; ++byte) {
    for (int half = 0; half < 2; ++half) {
      const int code = (byte >> (4 * half)) & 15;
      pairs.value[byte][half] = (code & 8) != 0 ? -kMagnitude[code & 7] : kMagnitude[code & 7];
    }
  }
  return pairs;
}();

struct E4m3Values {
  float value[256];
};
constexpr E4m3Values kPortableE4m3 = [] {
  E4m3Values table{};
  for (int code = 0; code < 256; ++code) {
    const int exponent = (code >> 3) & 15;
    const int mantissa = code & 7;
    float value = static_cast<float>(exponent == 0 ? mantissa : 8 + mantissa) / 512.0f;
    for (int e = 1; e < exponent; ++e) value *= 2.0f;
    if ((code & 127) == 127) value = __builtin_nanf("");
    table.value[code] = (code & 128) != 0 ? -value : value;
  }
  return table;
}();

[[maybe_unused]] inline float portable_e8m0(std::uint8_t code) {
  if (code == 255) return __builtin_nanf("");
  const std::uint32_t bits = code == 0 ? 0x00400000u : static_cast<std::uint32_t>(code) << 23;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

[[maybe_unused]] void portable_bf16(const std::uint8_t* codes, std::int64_t n, float* out) {
  for (std::int64_t i = 0; i < n; ++i) {
    std::uint16_t code;
    std::memcpy(&code, codes + 2 * i, sizeof(code));
    const std::uint32_t bits = static_cast<std::uint32_t>(code) << 16;
    std::memcpy(out + i, &bits, sizeof(bits));
  }
}

[[maybe_unused]] void portable_e4m3(const std::uint8_t* codes, std::int64_t n, float scale,
                                    float* out) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = kPortableE4m3.value[codes[i]] * scale;
}

template <int size>
void portable_group(const std::uint8_t* packed, float scale, float* out) {
  for (int i = 0; i < size / 2; ++i) {
    out[2 * i] = kPortableFp4.value[packed[i]][0] * scale;
    out[2 * i + 1] = kPortableFp4.value[packed[i]][1] * scale;
  }
}

[[maybe_unused]] void portable_nvfp4(const std::uint8_t* packed, const std::uint8_t* scales,
                                     std::int64_t n, float* out) {
  for (std::int64_t i = 0; i < n; i += 16) {
    portable_group<16>(packed + i / 2, kPortableE4m3.value[scales[i / 16]], out + i);
  }
}

[[maybe_unused]] void portable_mxfp4(const std::uint8_t* packed, const std::uint8_t* scales,
                                     std::int64_t n, float* out) {
  for (std::int64_t i = 0; i < n; i += 32) {
    portable_group<32>(packed + i / 2, portable_e8m0(scales[i / 32]), out + i);
  }
}

}  // namespace
}  // namespace dsfp4::ops::cpu
