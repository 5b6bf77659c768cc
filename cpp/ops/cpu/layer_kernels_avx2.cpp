// Layer kernels for AVX2 and FMA; see layer_kernels_impl.h for what they compute.
#define DSFP4_LANES 8
#define DSFP4_TILE_ROWS 6
#define DSFP4_TILE_VECTORS 2
#include "ops/cpu/layer_kernels_impl.h"

namespace dsfp4::ops::cpu {
constinit const LayerKernels kAvx2LayerKernels = make_layer_kernels("avx2");
}  // namespace dsfp4::ops::cpu
