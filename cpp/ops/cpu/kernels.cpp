#include "ops/cpu/kernels.h"

#include <cstdlib>
#include <string>

#include "dsfp4/error.h"

namespace dsfp4::ops::cpu {
namespace {

struct Choice {
  const Kernels* kernels;
  bool usable;
};

const Kernels& choose() {
  __builtin_cpu_init();
  const Choice choices[] = {
      {&kAvx512Kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512dq")},
      {&kAvx2Kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {&kBaselineKernels, true},
  };
  const char* wanted = std::getenv("DSFP4_ISA");
  for (const Choice& choice : choices) {
    if (wanted == nullptr || *wanted == '\0') {
      if (choice.usable) return *choice.kernels;
    } else if (std::string(wanted) == choice.kernels->isa) {
      if (choice.usable) return *choice.kernels;
      throw ParameterError("DSFP4_ISA", "this CPU has no " + std::string(wanted));
    }
  }
  throw ParameterError("DSFP4_ISA",
                       "'" + std::string(wanted) + "' is not one of avx512, avx2, baseline");
}

}  // namespace

const Kernels& select_kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace dsfp4::ops::cpu
