// The product of 16 FP4 rows and one token by one warp, in exact integers, for stream_tiles().
#pragma once

#include "ops/cuda/decode.cuh"
#include "ops/cuda/small.cuh"

namespace dsfp4::ops::cuda {

/// Twice a weight is a byte that prmt looks up, an activation 16 bits of fixed point, as two digits
/// of base 255, with one FP32 multiplier for 16 values. A column of mma is one digit of one lane of
/// a quad, zero for the other lanes' values: so each lane gets the sums of just the values that it
/// has loaded, and only these sums are multiplied with scales. Exact but for the activations'
/// rounding to 16 bits.
template <WeightFormat kFormat>
struct OneTokenProduct {
  using W = Words<kFormat>;
  static_assert(kFormat == WeightFormat::kNvfp4 || kFormat == WeightFormat::kMxfp4);
  static constexpr int kGroup = 16;                   // values that share a multiplier
  static constexpr int kGroups = W::kChunk / kGroup;  // of a chunk
  static constexpr int kDigitBytes = 2 * W::kChunk;   // of a chunk
  static constexpr int kBytes = kDigitBytes + kGroups * 4;
  static constexpr int kZeroBytes = kOfPiece * kDigitBytes;
  static constexpr float kMost = 127.0f * 255.0f + 127.0f;

  static __host__ __device__ constexpr int token_bytes(int pieces) {
    return pieces * (kOfPiece * kBytes) + kZeroBytes;
  }

  /// Digits, then the groups' multipliers, then zeros. A chunk has, for each half of a lane's
  /// values, 16 bytes for each digit of each lane.
  static __device__ __noinline__ void stage(const float* from, int cols, std::byte* to, int thread,
                                            int threads) {
    const int eights = pieces_of<kFormat>(cols) * (kOfPiece * W::kChunk / 8);
    auto* multipliers = reinterpret_cast<float*>(to + multipliers_at(cols));
    clear_zeros(to, cols, thread);
    for_eights(from, eights, cols, thread, threads, [&](int eight, const float values[8]) {
      float rounded[8];
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        rounded[i] = round_bf16(values[i]);
        largest = fmaxf(largest, magnitude(rounded[i]));
      }
#pragma unroll
      for (int step = 1; step < kGroup / 8; step *= 2) {  // neighbours share a group
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
      }
      if (eight >= eights) return;
      if (eight % (kGroup / 8) == 0) {
        multipliers[eight * 8 / kGroup] = multiplier_of(largest);
      }
      const float inverse = inverse_of(largest);
      unsigned high[8];
      unsigned low[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) to_digits(rounded[i], inverse, high[i], low[i]);
      auto* place = reinterpret_cast<uint2*>(to + digit_at(eight * 8));
      place[0] = {low_bytes(high), low_bytes(high + 4)};
      place[2] = {low_bytes(low), low_bytes(low + 4)};
    });
  }

  /// A group of a token of `cols` values, from column `first` on, one in each of a warp's first
  /// lanes, as copy() takes it: digits, then multipliers.
  static __device__ __forceinline__ void store(float value, int cols, std::byte* to, int first) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const float rounded = round_bf16(value);
    float largest = magnitude(rounded);
#pragma unroll
    for (int step = 1; step < kGroup; step *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    }
    unsigned high;
    unsigned low;
    to_digits(rounded, inverse_of(largest), high, low);
    if (lane >= kGroup) return;
    auto* place = reinterpret_cast<unsigned char*>(to + digit_at(first + lane));
    place[0] = static_cast<unsigned char>(high);
    place[16] = static_cast<unsigned char>(low);
    if (lane == 0) {
      reinterpret_cast<float*>(to + 2 * cols)[first / kGroup] = multiplier_of(largest);
    }
  }

  /// Stages a token that store() has written; `cols` is a multiple of a chunk.
  static __device__ __forceinline__ void copy(const std::byte* from, int cols, std::byte* to,
                                              int thread, int threads) {
    constexpr int kTogether = 5;  // are loaded before the first is stored
    const int digits = 2 * cols / 16;
    const int all = digits + cols / kGroup / 4;
    const int padded = multipliers_at(cols) / 16;
    clear_zeros(to, cols, thread);
    if (padded > digits) {  // the last piece is half empty
      auto* units = reinterpret_cast<uint4*>(to);
      for (int i = thread; i < padded - digits; i += threads) units[digits + i] = {};
      for (int i = thread; i < kGroups / 4; i += threads) units[padded + all - digits + i] = {};
    }
    for (int i = thread; i < all; i += kTogether * threads) {
      uint4 units[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int at = i + j * threads;
        if (at < all) units[j] = reinterpret_cast<const uint4*>(from)[at];
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int at = i + j * threads;
        if (at < all) {
          reinterpret_cast<uint4*>(to)[at < digits ? at : at - digits + padded] = units[j];
        }
      }
    }
  }

  __device__ __forceinline__ void clear() { low = high = 0.0f; }

  __device__ __forceinline__ void add(const Piece<kFormat>& piece, int number, const Staged& x,
                                      int) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int quad = lane % 4;
    const bool mine = lane / 8 == quad;
    const unsigned digits = x.at + (mine ? lane / 4 * 16 + number * (kOfPiece * kDigitBytes)
                                         : x.pieces * (kOfPiece * kBytes));
    const unsigned multipliers = x.at + x.pieces * (kOfPiece * kDigitBytes) +
                                 (number * kOfPiece * kGroups + quad * (kGroups / 4)) * 4;
#pragma unroll
    for (int c = 0; c < kOfPiece; ++c) {
      // Beyond the digits of a lane that has none lie as many zeros.
      add(piece.low[c], piece.high[c], piece.low_scales[c], piece.high_scales[c],
          digits + c * kDigitBytes, multipliers + c * kGroups * 4);
    }
  }

  /// As TokensProduct's, for token 0.
  __device__ __forceinline__ void finish(float result[4]) const {
    result[0] = quad_sum(low);
    result[1] = 0.0f;
    result[2] = quad_sum(high);
    result[3] = 0.0f;
  }

  static __host__ __device__ float epilogue(float global_scale) {
    // Weights came twice their size.
    return kFormat == WeightFormat::kNvfp4 ? 0.5f * global_scale : 0.5f;
  }

  float low, high;  // this lane's share of rows g and g + 8

  __device__ __forceinline__ OneTokenProduct()
      : positive_{in_register(0x04030200u), in_register(0x0d090705u)},
        negative_{in_register(0xfdfeff00u), in_register(0xf4f8fafcu)} {}

 private:
  // A chunk.
  __device__ __forceinline__ void add(const uint4& low_words, const uint4& high_words,
                                      unsigned low_scales, unsigned high_scales, unsigned digits,
                                      unsigned multipliers) {
    const uint4 first = load_shared16(digits);
    const uint4 second = load_shared16(digits + 128);
    const float2 of_groups = load_shared_floats(multipliers);
    const unsigned b[8] = {first.x,  first.y,  first.z,  first.w,
                           second.x, second.y, second.z, second.w};
    const unsigned l[4] = {low_words.x, low_words.y, low_words.z, low_words.w};
    const unsigned h[4] = {high_words.x, high_words.y, high_words.z, high_words.w};
    float scales_low[2];
    float scales_high[2];
    if constexpr (kFormat == WeightFormat::kNvfp4) {
      two_e4m3(low_scales, scales_low);
      two_e4m3(high_scales, scales_high);
    } else {
      scales_low[0] = scales_low[1] = e8m0_value(low_scales);
      scales_high[0] = scales_high[1] = e8m0_value(high_scales);
    }
    constexpr int kWords = kGroup / 8;
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      int sums[4] = {};
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int w = group * kWords + i;
        multiply_codes(sums, l[w], h[w], b[2 * w], b[2 * w + 1]);
      }
      const float multiplier = group == 0 ? of_groups.x : of_groups.y;
      low = fmaf(static_cast<float>(sums[0] * 255 + sums[1]), scales_low[group] * multiplier, low);
      high =
          fmaf(static_cast<float>(sums[2] * 255 + sums[3]), scales_high[group] * multiplier, high);
    }
  }

  // prmt takes one constant at most: the tables would be moved to registers each time. So would
  // what is the same in all lanes; of this the compiler cannot know.
  static __device__ __forceinline__ unsigned in_register(unsigned value) {
    unsigned before, after;
    asm volatile("mov.u32 %0, %%lanemask_lt;" : "=r"(before));
    asm volatile("mov.u32 %0, %%lanemask_gt;" : "=r"(after));
    return value | (before & after);
  }

  static __device__ __forceinline__ unsigned look_up(unsigned first, unsigned second,
                                                     unsigned codes) {
    unsigned bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(first), "r"(second), "r"(codes));
    return bytes;
  }

  // Where a staged token of `cols` has its multipliers, and the first digit of column `col`.
  static __device__ __forceinline__ int multipliers_at(int cols) {
    return pieces_of<kFormat>(cols) * (kOfPiece * kDigitBytes);
  }
  static __device__ __forceinline__ int digit_at(int col) {
    const int in = col % W::kChunk;
    return col / W::kChunk * kDigitBytes + in % W::kLane / 16 * 128 + in / W::kLane * 32 + in % 16;
  }
  static __device__ __forceinline__ void clear_zeros(std::byte* to, int cols, int thread) {
    if (thread >= kZeroBytes / 16) return;
    reinterpret_cast<uint4*>(to + pieces_of<kFormat>(cols) * (kOfPiece * kBytes))[thread] = {};
  }

  static __device__ __forceinline__ float magnitude(float value) {
    return fabsf(value) < INFINITY ? fabsf(value) : INFINITY;  // NaN, too
  }
  static __device__ __forceinline__ float multiplier_of(float largest) {
    return largest < INFINITY ? largest * (1.0f / kMost) : NAN;
  }
  static __device__ __forceinline__ float inverse_of(float largest) {
    return largest > 0.0f ? kMost / largest : 0.0f;
  }
  // In the low byte of each.
  static __device__ __forceinline__ void to_digits(float value, float inverse, unsigned& high,
                                                   unsigned& low) {
    // Added to 1.5 * 2^23, a number is rounded, and its low byte is the digit.
    constexpr float kRound = 12582912.0f;
    const float fixed = fmaf(value, inverse, kRound) - kRound;
    const float digit = fmaf(fixed, 1.0f / 255.0f, kRound);
    high = __float_as_uint(digit);
    low = __float_as_uint(fmaf(digit - kRound, -255.0f, fixed) + kRound);
  }

  static __device__ __forceinline__ unsigned low_bytes(const unsigned words[4]) {
    return __byte_perm(__byte_perm(words[0], words[1], 0x0040),
                       __byte_perm(words[2], words[3], 0x0040), 0x5410);
  }

  // Eight codes of each of two rows. prmt takes a code's three low bits for the place; where the
  // sign is set it gives 0 or -1, as the byte there has its top bit. So positive weights are w + 1
  // in the first product and -1 in the second, negative ones 0 and w.
  __device__ __forceinline__ void multiply_codes(int sums[4], unsigned low, unsigned high,
                                                 unsigned b0, unsigned b1) const {
    const unsigned(&p)[2] = positive_;
    const unsigned(&n)[2] = negative_;
    multiply_bytes(sums, look_up(p[0], p[1], low), look_up(p[0], p[1], high),
                   look_up(p[0], p[1], low >> 16), look_up(p[0], p[1], high >> 16), b0, b1);
    low ^= 0x88888888u;
    high ^= 0x88888888u;
    multiply_bytes(sums, look_up(n[0], n[1], low), look_up(n[0], n[1], high),
                   look_up(n[0], n[1], low >> 16), look_up(n[0], n[1], high >> 16), b0, b1);
  }

  static __device__ __forceinline__ void multiply_bytes(int c[4], unsigned a0, unsigned a1,
                                                        unsigned a2, unsigned a3, unsigned b0,
                                                        unsigned b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};\n"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }

  /// Two neighbouring codes.
  static __device__ __forceinline__ void two_e4m3(unsigned codes, float out[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    unsigned halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<unsigned short>(codes)));
    const float2 values = __half22float2(*reinterpret_cast<const __half2*>(&halves));
    out[0] = values.x;
    out[1] = values.y;
#else
    out[0] = e4m3_value(codes & 0xffu);
    out[1] = e4m3_value(codes >> 8);
#endif
  }

  static __device__ __forceinline__ float quad_sum(float value) {
    value += __shfl_xor_sync(0xffffffffu, value, 1);
    return value + __shfl_xor_sync(0xffffffffu, value, 2);
  }

  unsigned positive_[2], negative_[2];
};

/// One token of any format.
template <WeightFormat kFormat>
struct OneToken {
  using Product = TokensProduct<kFormat>;
};
template <>
struct OneToken<WeightFormat::kNvfp4> {
  using Product = OneTokenProduct<WeightFormat::kNvfp4>;
};
template <>
struct OneToken<WeightFormat::kMxfp4> {
  using Product = OneTokenProduct<WeightFormat::kMxfp4>;
};

}  // namespace dsfp4::ops::cuda
