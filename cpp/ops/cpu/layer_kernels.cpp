#include "ops/cpu/layer_kernels.h"

namespace dsfp4::ops::cpu {

const LayerKernels& layer_kernels_for(std::string_view isa) {
  if (isa.starts_with("avx512") || isa.starts_with("amx")) return kAvx512LayerKernels;
  if (isa.starts_with("avx2")) return kAvx2LayerKernels;
  return kBaselineLayerKernels;
}

}  // namespace dsfp4::ops::cpu
