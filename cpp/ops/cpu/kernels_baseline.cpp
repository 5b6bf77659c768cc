// Kernels for every x86-64 CPU; see kernels_impl.h for what they compute.
#include "ops/cpu/kernels_impl.h"

namespace dsfp4::ops::cpu {
constinit const Kernels kBaselineKernels = make_kernels("baseline");
}  // namespace dsfp4::ops::cpu
