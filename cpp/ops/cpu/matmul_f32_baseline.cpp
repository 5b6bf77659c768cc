// FP32 products for every x86-64 CPU, and the model of the other files. Bytes moved: the weights
// in their stored format, once for 96 tokens.
#include "ops/cpu/decode_portable.h"

#define DSFP4_LANES 4
#define DSFP4_ROWS 4
#define DSFP4_TOKENS 2
#define DSFP4_CHUNK 1024
#define DSFP4_GROUPS 1

namespace dsfp4::ops::cpu {
namespace {
// NOLINTBEGIN(readability-identifier-naming): functions by another name
constexpr auto decode_bf16 = portable_bf16;
constexpr auto decode_e4m3 = portable_e4m3;
constexpr auto decode_nvfp4 = portable_nvfp4;
constexpr auto decode_mxfp4 = portable_mxfp4;
// NOLINTEND(readability-identifier-naming)
}  // namespace
}  // namespace dsfp4::ops::cpu

#include "ops/cpu/matmul_f32_impl.h"

namespace dsfp4::ops::cpu {
const Matmul kMatmulF32Baseline = {"f32_baseline",   0,        sizeof(BlockedScratch<F32>),
                                   packed_f32_bytes, pack_f32, multiply_blocked<F32>};
}  // namespace dsfp4::ops::cpu
