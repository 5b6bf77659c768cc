#include "ops/cpu/peak.h"

#include "ops/cpu/layer_kernels.h"

namespace dsfp4::ops::cpu {

std::vector<PeakLoop> peak_loops() {
  __builtin_cpu_init();
  std::vector<PeakLoop> loops = {
      {"fp32 sse2", "baseline", kBaselineLayerKernels.multiply_in_registers}};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    loops.push_back({"fp32 avx2", "avx2", kAvx2LayerKernels.multiply_in_registers});
    loops.push_back({"int16 avx2", "avx2", multiply_int16_avx2});
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    loops.push_back({"fp32 avx512", "avx512", kAvx512LayerKernels.multiply_in_registers});
    if (__builtin_cpu_supports("avx512bf16")) {
      loops.push_back({"bf16 avx512", "avx512bf16", multiply_bf16_avx512});
    }
  }
  return loops;
}

}  // namespace dsfp4::ops::cpu
