// What the processor can compute at most: loops that touch nothing but registers. They are the
// arithmetic half of a kernel's floor.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace dsfp4::ops::cpu {

struct PeakLoop {
  std::string_view name;  // operands and instruction set, as "fp32 avx2"
  std::string_view isa;   // the least DSFP4_ISA that may use it
  /// `steps` rounds; returns the operations done, two a multiply-add. `sink` gets a value that
  /// depends on all of them.
  double (*run)(std::int64_t steps, float* sink);
};

/// The loops that this CPU can run.
std::vector<PeakLoop> peak_loops();

/// Signed 16-bit pairs (vpmaddwd) and BF16 pairs (vdpbf16ps).
double multiply_int16_avx2(std::int64_t steps, float* sink);
double multiply_bf16_avx512(std::int64_t steps, float* sink);

}  // namespace dsfp4::ops::cpu
