// Layer kernels for AVX-512 F, BW, VL and DQ; see layer_kernels_impl.h for what they compute.
#define DSFP4_LANES 16
#define DSFP4_TILE_ROWS 6
#define DSFP4_TILE_VECTORS 4
#include "ops/cpu/layer_kernels_impl.h"

namespace dsfp4::ops::cpu {
constinit const LayerKernels kAvx512LayerKernels = make_layer_kernels("avx512");
}  // namespace dsfp4::ops::cpu
