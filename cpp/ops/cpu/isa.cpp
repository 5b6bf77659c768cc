#include "ops/cpu/isa.h"

#include <cstdlib>
#include <string>
#include <vector>

#include "dsfp4/error.h"

namespace dsfp4::ops::cpu {
namespace {

// Columns as in WeightFormat: F32, BF16, FP8, NVFP4, MXFP4.
constexpr Isa kAvx512Bf16 = {"avx512bf16",
                             &kAvx512Kernels,
                             &kMatmulF32Avx512,
                             {&kMatmulF32Avx512, &kMatmulBf16Avx512Bf16, &kMatmulFp8Avx512Bf16,
                              &kMatmulFp4Avx512Bf16, &kMatmulFp4Avx512Bf16},
                             {&kMatmulF32Avx512, &kMatmulBf16Avx512Bf16, &kMatmulFp8Avx512Bf16,
                              &kMatmulFp4Avx512Vnni, &kMatmulFp4Avx512Vnni}};
constexpr Isa kAmx = {
    "amx",     kAvx512Bf16.kernels, kAvx512Bf16.exact, kAvx512Bf16.prefill, kAvx512Bf16.decode,
    &kTilesAmx};
constexpr Isa kAvx512Vnni = {
    "avx512vnni",
    &kAvx512Kernels,
    &kMatmulF32Avx512,
    {&kMatmulF32Avx512, &kMatmulF32Avx512, &kMatmulF32Avx512, &kMatmulF32Avx512, &kMatmulF32Avx512},
    {&kMatmulF32Avx512, &kMatmulF32Avx512, &kMatmulF32Avx512, &kMatmulFp4Avx512Vnni,
     &kMatmulFp4Avx512Vnni}};
constexpr Isa kAvx512 = {
    "avx512",
    &kAvx512Kernels,
    &kMatmulF32Avx512,
    {&kMatmulF32Avx512, &kMatmulF32Avx512, &kMatmulF32Avx512, &kMatmulF32Avx512, &kMatmulF32Avx512},
    {&kMatmulF32Avx512, &kMatmulF32Avx512, &kMatmulF32Avx512, &kMatmulFp4Avx2, &kMatmulFp4Avx2}};
constexpr Isa kAvx2 = {
    "avx2",
    &kAvx2Kernels,
    &kMatmulF32Avx2,
    {&kMatmulF32Avx2, &kMatmulF32Avx2, &kMatmulF32Avx2, &kMatmulFp4Avx2, &kMatmulFp4Avx2}};
constexpr Isa kBaseline = {"baseline",
                           &kBaselineKernels,
                           &kMatmulF32Baseline,
                           {&kMatmulF32Baseline, &kMatmulF32Baseline, &kMatmulF32Baseline,
                            &kMatmulF32Baseline, &kMatmulF32Baseline}};

constexpr std::array<const Isa*, 6> kAll = {&kAmx,    &kAvx512Bf16, &kAvx512Vnni,
                                            &kAvx512, &kAvx2,       &kBaseline};

bool runs(const Isa& isa) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      avx2;
  const bool vnni =
      avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
  const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
  if (&isa == &kAmx) return bf16 && amx_usable();
  if (&isa == &kAvx512Bf16) return bf16;
  if (&isa == &kAvx512Vnni) return vnni;
  if (&isa == &kAvx512) return avx512;
  if (&isa == &kAvx2) return avx2;
  return true;
}

std::string known_names() {
  std::string names;
  for (const Isa* isa : kAll) names.append(isa->name).append(", ");
  return names + "scalar";
}

}  // namespace

std::span<const Isa* const> known_isas() { return kAll; }

std::span<const Isa* const> runnable_isas() {
  static const std::vector<const Isa*> found = [] {
    std::vector<const Isa*> isas;
    for (const Isa* isa : kAll) {
      if (runs(*isa)) isas.push_back(isa);
    }
    return isas;
  }();
  return found;
}

const Isa& isa_named(std::string_view name) {
  if (name.empty()) return *runnable_isas().front();
  if (name == "scalar") name = kBaseline.name;
  for (const Isa* isa : kAll) {
    if (name != isa->name) continue;
    if (runs(*isa)) return *isa;
    throw ParameterError("DSFP4_ISA", "this machine cannot run " + std::string(name) +
                                          "; the best that it can is " +
                                          std::string(runnable_isas().front()->name));
  }
  throw ParameterError("DSFP4_ISA", "'" + std::string(name) + "' is not one of " + known_names());
}

const Isa& select_isa() {
  const char* wanted = std::getenv("DSFP4_ISA");
  return isa_named(wanted == nullptr ? "" : wanted);
}

}  // namespace dsfp4::ops::cpu
