// Kernels for AVX-512 F, BW, VL and DQ; see kernels_impl.h for what they compute.
#include "ops/cpu/kernels_impl.h"

namespace dsfp4::ops::cpu {
constinit const Kernels kAvx512Kernels = make_kernels("avx512");
}  // namespace dsfp4::ops::cpu
