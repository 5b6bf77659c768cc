// Stored words to pairs of BF16, as the A operand of mma.sync.m16n8k16 wants them.
//
// A lane reads 16 bytes of a row; the four lanes of a quad read 64, a chunk. The order of the
// columns within a product is free as long as both operands agree, so it is the one in which a word
// decodes cheapest; column_place() puts activations in it. Values are decoded exactly: E2M1 and
// E4M3 become subnormal BF16 numbers by moving their bits, and one multiplication by the block's
// scale (times a power of two) makes them normal. What is left of the powers of two and NVFP4's
// global scale is word_epilogue().
//   NVFP4:  2^-126 w * 2^119 s           -> 2^7
//   MXFP4:  2^-126 w * 2^100 s           -> 2^26   (s from 2^-99 to 2^27; beyond, it is clamped)
//   FP8:    2^-120 w * 2^120             -> 1; the tile's FP32 scale goes to the sums
#pragma once

#include "ops/cuda/common.cuh"

namespace dsfp4::ops::cuda {

using format::WeightFormat;
using format::WeightView;

/// Values in a lane's 16 bytes, in a quad's chunk, and products of 16 columns in a chunk.
template <WeightFormat kFormat>
struct Words {
  static constexpr int kLane = kFormat == WeightFormat::kBF16       ? 8
                               : kFormat == WeightFormat::kFp8Block ? 16
                                                                    : 32;
  static constexpr int kChunk = 4 * kLane;
  static constexpr int kSteps = kChunk / 16;
  /// Bytes of block scales of a row in a chunk; 0: none here.
  static constexpr int kScales = kFormat == WeightFormat::kNvfp4   ? 8
                                 : kFormat == WeightFormat::kMxfp4 ? 4
                                                                   : 0;
};

/// Where value `v` of a lane's 16 bytes comes in the order of decoding.
template <WeightFormat kFormat>
__host__ __device__ constexpr int decoded_place(int v) {
  if constexpr (kFormat == WeightFormat::kBF16) {
    return v;
  } else if constexpr (kFormat == WeightFormat::kFp8Block) {  // pairs (0, 2), (1, 3) of four
    const int in = v % 4;
    return v - in + (in == 1 ? 2 : in == 2 ? 1 : in);
  } else {  // pairs (0, 4), (1, 5), (2, 6), (3, 7) of eight
    const int in = v % 8;
    return v - in + (in < 4 ? 2 * in : 2 * (in - 4) + 1);
  }
}

__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}

__device__ __forceinline__ unsigned times_bf16x2(unsigned a, unsigned b) {
  unsigned product;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
  return product;
}

constexpr unsigned bf16_twice(unsigned bits) { return bits | (bits << 16); }
constexpr unsigned kTwo120 = bf16_twice((127u + 120u) << 7);
constexpr unsigned kTwo119 = bf16_twice((127u + 119u) << 7);

/// The first (0) or second (1) half of the four pairs, 2^-126 w each, of eight E2M1 codes.
__device__ __forceinline__ void decode_fp4(unsigned word, int half, unsigned out[2]) {
  constexpr unsigned kSign = 0x80008000u;
  constexpr unsigned kRest = 0x01c001c0u;
  // A product puts a code into bits 12 to 15, where its sign belongs, and 6 to 9, where the rest.
  if (half == 0) {
    out[0] = ((word & 0x000f000fu) * 0x1040u) & (kSign | kRest);
    out[1] = ((word & 0x00f000f0u) * 0x0104u) & (kSign | kRest);
  } else {
    out[0] = (((word >> 2) & 0x03c003c0u) * 0x0041u) & (kSign | kRest);
    out[1] = (word & kSign) | ((word >> 6) & kRest);
  }
}

/// Four E4M3 codes: two pairs of w.
__device__ __forceinline__ void decode_fp8(unsigned word, unsigned out[2]) {
  constexpr unsigned kSign = 0x80008000u;
  constexpr unsigned kRest = 0x07f007f0u;
  out[0] = times_bf16x2(((word << 8) & kSign) | ((word << 4) & kRest), kTwo120);
  out[1] = times_bf16x2((word & kSign) | ((word >> 4) & kRest), kTwo120);
}

/// An E4M3 block scale, times 2^119, twice.
__device__ __forceinline__ unsigned nvfp4_scale(unsigned code) {
  const unsigned bits = ((code & 0x80u) << 8) | ((code & 0x7fu) << 4);  // 2^-120 s
  return times_bf16x2(times_bf16x2(bits | (bits << 16), kTwo120), kTwo119);
}

/// Four of them at once, of two rows with two groups each, a row in 16 bits: out[row][group].
__device__ __forceinline__ void nvfp4_scales(unsigned codes, unsigned out[2][2]) {
  unsigned groups[2];  // s of both rows
  decode_fp8(codes, groups);
#pragma unroll
  for (int g = 0; g < 2; ++g) {
    const unsigned rows = times_bf16x2(groups[g], kTwo119);
    out[0][g] = __byte_perm(rows, 0, 0x1010);
    out[1][g] = __byte_perm(rows, 0, 0x3232);
  }
}

/// An E8M0 block scale, times 2^100, twice.
__device__ __forceinline__ unsigned mxfp4_scale(unsigned code) {
  const unsigned exponent = min(max(code + 100u, 1u), 254u);
  return bf16_twice(exponent << 7);
}

/// What the sums are multiplied with in the end.
__host__ __device__ inline float word_epilogue(WeightFormat format, float global_scale) {
  if (format == WeightFormat::kNvfp4) return 128.0f * global_scale;
  return format == WeightFormat::kMxfp4 ? 0x1p26f : 1.0f;
}
__host__ __device__ inline float word_epilogue(const WeightView& weight) {
  return word_epilogue(weight.format, weight.global_scale);
}

/// c += a b on 16 rows of the weight and 8 tokens.
__device__ __forceinline__ void multiply(float c[4], const unsigned a[4], unsigned b0,
                                         unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Whether the rows of `weight` can be read in words of 16 bytes.
inline bool has_words(const WeightView& weight) {
  const auto address = reinterpret_cast<std::uintptr_t>(weight.data);
  const std::int64_t lane = weight.format == WeightFormat::kBF16       ? 8
                            : weight.format == WeightFormat::kFp8Block ? 16
                                                                       : 32;
  return weight.format != WeightFormat::kF32 && address % 16 == 0 && weight.cols % lane == 0 &&
         reinterpret_cast<std::uintptr_t>(weight.scales) % 4 == 0;
}

/// Calls with the format as a constant; FP32 fails.
template <class Call>
bool for_format(WeightFormat format, const Call& call) {
  switch (format) {
    case WeightFormat::kBF16:
      return call.template operator()<WeightFormat::kBF16>();
    case WeightFormat::kFp8Block:
      return call.template operator()<WeightFormat::kFp8Block>();
    case WeightFormat::kNvfp4:
      return call.template operator()<WeightFormat::kNvfp4>();
    case WeightFormat::kMxfp4:
      return call.template operator()<WeightFormat::kMxfp4>();
    case WeightFormat::kF32:
      break;
  }
  return fail(cudaErrorInvalidValue, "a fast product of FP32 weights", __FILE__, __LINE__);
}

}  // namespace dsfp4::ops::cuda
