// The scalar codes: BF16, E4M3 (FN), E2M1, E8M0. Pure functions.
// Sources: OCP Microscaling Formats v1.0 (E2M1, E8M0), OCP 8-bit floating point v1.0 (E4M3).
#pragma once

#include <cstdint>

namespace dsfp4::format {

float bf16_to_float(std::uint16_t code);
/// Rounds to nearest even; a NaN stays a (quiet) NaN; overflow gives infinity.
std::uint16_t float_to_bf16(float value);

/// bias 7, largest 448, NaN 0x7F / 0xFF, subnormal step 2^-9.
float e4m3_to_float(std::uint8_t code);
/// Rounds to nearest even, saturates at +-448 (infinities too), keeps NaN (sign kept).
std::uint8_t float_to_e4m3(float value);
/// The same for a quotient that is not a float: rounds once.
std::uint8_t double_to_e4m3(double value);

/// Only the low four bits of `code` are read: 0 .5 1 1.5 2 3 4 6, bit 3 is the sign.
float e2m1_to_float(std::uint8_t code);
/// Rounds to nearest even, saturates at +-6. Throws ParameterError for NaN and infinity.
std::uint8_t float_to_e2m1(float value);

/// 2^(code - 127); 255 is NaN; code 0 is 2^-127 (a subnormal float).
float e8m0_to_float(std::uint8_t code);
/// The MX scale of a block whose largest magnitude is `amax` >= 0: 2^ceil(log2(amax / 6)), clamped
/// to 2^-127 .. 2^127 (DeepSeek's choice); code 127 for amax 0. Throws ParameterError if amax is
/// negative, NaN or infinite.
std::uint8_t mx_scale_code(float amax);

}  // namespace dsfp4::format
