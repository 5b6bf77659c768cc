// Kernels for AVX2 and FMA; see kernels_impl.h for what they compute.
#include "ops/cpu/kernels_impl.h"

namespace dsfp4::ops::cpu {
constinit const Kernels kAvx2Kernels = make_kernels("avx2");
}  // namespace dsfp4::ops::cpu
