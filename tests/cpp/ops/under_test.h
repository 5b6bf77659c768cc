// The instruction sets that a test program covers: those that this machine runs, or in
// dsfp4_emulated_tests, whose kernels above AVX2 have their intrinsics in plain C++, all of them.
#pragma once

#include "ops/cpu/isa.h"

namespace dsfp4::ops::cpu {

inline std::span<const Isa* const> isas_under_test() {
#ifdef DSFP4_EMULATED
  return known_isas();
#else
  return runnable_isas();
#endif
}

}  // namespace dsfp4::ops::cpu
