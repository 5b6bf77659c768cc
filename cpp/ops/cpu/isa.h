// The instruction sets that the CPU backend is written for, and the choice among them.
//
// The first of these that the CPU (and the system) can run is taken; DSFP4_ISA names another one:
//   amx        as avx512bf16, and AMX BF16 tiles for prefill
//   avx512bf16 as avx512vnni, and AVX-512 BF16: products of BF16 pairs
//   avx512vnni as avx512, and VNNI and VBMI: FP4 in decode in exact integers
//   avx512     AVX-512 F, BW, DQ, VL: FP32, but FP4 in decode as avx2, which is faster there
//   avx2       AVX2 and FMA: FP4 in exact integers, the rest in FP32
//   baseline   every x86-64 CPU (also called "scalar"): FP32
#pragma once

#include <array>
#include <span>
#include <string_view>

#include "ops/cpu/kernels.h"
#include "ops/cpu/matmul.h"
#include "ops/cpu/tiles.h"
#include "ops/views.h"

namespace dsfp4::ops::cpu {

struct Isa {
  std::string_view name;
  const Kernels* kernels;
  const Matmul* exact;  // Inputs::kF32, and F32 weights
  /// Inputs::kBf16, by WeightFormat; one arithmetic for each phase, whatever the tokens.
  std::array<const Matmul*, format::kWeightFormats> prefill;
  std::array<const Matmul*, format::kWeightFormats> decode = prefill;
  const Tiles* tiles = nullptr;  // for prefill, if there are any

  const Matmul& matmul(format::WeightFormat format, Inputs inputs, Phase phase) const {
    if (inputs == Inputs::kF32) return *exact;
    return *(phase == Phase::kDecode ? decode : prefill).at(static_cast<std::size_t>(format));
  }
};

/// All of them, best first.
std::span<const Isa* const> known_isas();
/// What this machine can run, best first; never empty.
std::span<const Isa* const> runnable_isas();
/// The best one, or the one that is named. ParameterError if `name` names none or one that this
/// machine cannot run.
const Isa& isa_named(std::string_view name);
/// isa_named of the environment variable DSFP4_ISA (empty if it is not set).
const Isa& select_isa();

}  // namespace dsfp4::ops::cpu
