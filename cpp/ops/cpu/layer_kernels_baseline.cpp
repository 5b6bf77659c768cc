// Layer kernels for every x86-64 CPU; see layer_kernels_impl.h for what they compute.
#define DSFP4_LANES 4
#define DSFP4_TILE_ROWS 4
#define DSFP4_TILE_VECTORS 2
#include "ops/cpu/layer_kernels_impl.h"

namespace dsfp4::ops::cpu {
constinit const LayerKernels kBaselineLayerKernels = make_layer_kernels("baseline");
}  // namespace dsfp4::ops::cpu
