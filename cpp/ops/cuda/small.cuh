// The product of 16 weight rows and up to 8 tokens by one warp, on tensor cores: the weights are
// the 16-row operand, the tokens the 8 columns. Weights go from memory to registers once, 16 bytes
// a lane; activations lie in shared memory as BF16.
#pragma once

#include "ops/cuda/words.cuh"

namespace dsfp4::ops::cuda {

constexpr int kSmallTokens = 8;

__device__ __forceinline__ uint4 load_stream(const void* from) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
}

/// Columns of the activations in shared memory: whole chunks.
template <WeightFormat kFormat>
__host__ __device__ constexpr std::int64_t staged_cols(std::int64_t cols) {
  constexpr std::int64_t kChunk = Words<kFormat>::kChunk;
  return (cols + kChunk - 1) / kChunk * kChunk;
}
/// BF16 values from one token to the next: 64 bytes off a multiple of 128, against bank conflicts.
template <WeightFormat kFormat>
__host__ __device__ constexpr std::int64_t staged_stride(std::int64_t cols) {
  return (staged_cols<kFormat>(cols) + 63) / 64 * 64 + 32;
}

/// Puts one token's `cols` values into shared memory, rounded, in the order of column_place();
/// all threads of the block take part.
template <WeightFormat kFormat>
__device__ __forceinline__ void stage_token(const float* from, std::int64_t cols,
                                            __nv_bfloat16* to) {
  constexpr int kLane = Words<kFormat>::kLane;
  constexpr int kChunk = Words<kFormat>::kChunk;
  const int padded = static_cast<int>(staged_cols<kFormat>(cols));
  for (int k = static_cast<int>(threadIdx.x); k < padded; k += static_cast<int>(blockDim.x)) {
    const int in = k % kChunk;
    const int quad = in / kLane;
    const int place = decoded_place<kFormat>(in % kLane);
    // Lane's piece `place / 8` (16 bytes) lies beside the other lanes' pieces of that number.
    const int at = k - in + (place / 8 * 4 + quad) * 8 + place % 8;
    to[at] = __float2bfloat16_rn(k < cols ? from[k] : 0.0f);
  }
}

/// Sums of a warp that are added up independently, to hide the latency of a product.
constexpr int kChains = 4;

/// A lane's words of two rows (g and g + 8 of the 16) in one chunk.
template <WeightFormat kFormat>
struct Piece {
  uint4 low, high;
  unsigned low_scales, high_scales;
};

template <WeightFormat kFormat>
__device__ __forceinline__ Piece<kFormat> load_piece(const WeightView& weight, std::int64_t row_low,
                                                     std::int64_t row_high, int chunk) {
  using W = Words<kFormat>;
  const int quad = static_cast<int>(threadIdx.x) % 4;
  Piece<kFormat> piece{};
  const std::int64_t col = std::int64_t{chunk} * W::kChunk + quad * W::kLane;
  if constexpr (kFormat == WeightFormat::kFp8Block) {
    // One for the whole product: both rows lie in one tile, as does the chunk.
    constexpr std::int64_t kTile = ::dsfp4::format::kFp8Tile;
    const std::int64_t tiles = (weight.cols + kTile - 1) / kTile;
    const auto* scales = reinterpret_cast<const float*>(weight.scales);
    piece.low_scales = __float_as_uint(
        __ldg(scales + row_low / kTile * tiles + std::int64_t{chunk} * W::kChunk / kTile));
  }
  if (col >= weight.cols) return piece;
  const std::int64_t row_bytes = weight.cols / W::kLane * 16;
  const std::int64_t at = col / W::kLane * 16;
  piece.low = load_stream(weight.data + row_low * row_bytes + at);
  piece.high = load_stream(weight.data + row_high * row_bytes + at);
  if constexpr (kFormat == WeightFormat::kNvfp4) {
    const auto* scales = reinterpret_cast<const unsigned short*>(weight.scales);
    const std::int64_t row_scales = weight.cols / 32;
    piece.low_scales = __ldg(scales + row_low * row_scales + col / 32);
    piece.high_scales = __ldg(scales + row_high * row_scales + col / 32);
  } else if constexpr (kFormat == WeightFormat::kMxfp4) {
    const auto* scales = reinterpret_cast<const unsigned char*>(weight.scales);
    const std::int64_t row_scales = weight.cols / 32;
    piece.low_scales = __ldg(scales + row_low * row_scales + col / 32);
    piece.high_scales = __ldg(scales + row_high * row_scales + col / 32);
  }
  return piece;
}

/// sums += the chunk's product with the tokens staged at `x`.
template <WeightFormat kFormat>
__device__ __forceinline__ void multiply_piece(const Piece<kFormat>& piece, int chunk,
                                               const __nv_bfloat16* x, std::int64_t stride,
                                               int tokens, float sums[kChains][4]) {
  using W = Words<kFormat>;
  const int quad = static_cast<int>(threadIdx.x) % 4;
  const int token = static_cast<int>(threadIdx.x) % 32 / 4;
  const auto* from = reinterpret_cast<const uint4*>(x + token * stride + chunk * W::kChunk) + quad;
  const bool mine = token < tokens;
  const unsigned low[4] = {piece.low.x, piece.low.y, piece.low.z, piece.low.w};
  const unsigned high[4] = {piece.high.x, piece.high.y, piece.high.z, piece.high.w};
  if constexpr (kFormat == WeightFormat::kNvfp4 || kFormat == WeightFormat::kMxfp4) {
    unsigned scale_low = 0;
    unsigned scale_high = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {  // a word: two products
      if (w == 0 || (w == 2 && kFormat == WeightFormat::kNvfp4)) {
        if constexpr (kFormat == WeightFormat::kNvfp4) {
          scale_low = nvfp4_scale((piece.low_scales >> (4 * w)) & 0xffu);
          scale_high = nvfp4_scale((piece.high_scales >> (4 * w)) & 0xffu);
        } else {
          scale_low = mxfp4_scale(piece.low_scales);
          scale_high = mxfp4_scale(piece.high_scales);
        }
      }
      const uint4 b = mine ? from[4 * w] : uint4{};
      unsigned l[4];
      unsigned h[4];
      decode_fp4(low[w], 0, l);
      decode_fp4(low[w], 1, l + 2);
      decode_fp4(high[w], 0, h);
      decode_fp4(high[w], 1, h + 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        l[i] = times_bf16x2(l[i], scale_low);
        h[i] = times_bf16x2(h[i], scale_high);
      }
      const unsigned a0[4] = {l[0], h[0], l[1], h[1]};
      const unsigned a1[4] = {l[2], h[2], l[3], h[3]};
      multiply(sums[w % 2 * 2], a0, b.x, b.y);
      multiply(sums[w % 2 * 2 + 1], a1, b.z, b.w);
    }
  } else if constexpr (kFormat == WeightFormat::kFp8Block) {
    float tile[2][4] = {};
#pragma unroll
    for (int w = 0; w < 4; w += 2) {  // two words: two products
      const uint4 b = mine ? from[4 * (w / 2)] : uint4{};
      unsigned l[4];
      unsigned h[4];
      decode_fp8(low[w], l);
      decode_fp8(low[w + 1], l + 2);
      decode_fp8(high[w], h);
      decode_fp8(high[w + 1], h + 2);
      const unsigned a0[4] = {l[0], h[0], l[1], h[1]};
      const unsigned a1[4] = {l[2], h[2], l[3], h[3]};
      multiply(tile[0], a0, b.x, b.y);
      multiply(tile[1], a1, b.z, b.w);
    }
    const float scale = __uint_as_float(piece.low_scales);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[0][i] = fmaf(scale, tile[0][i] + tile[1][i], sums[0][i]);
  } else {
    const uint4 b = mine ? from[0] : uint4{};
    const unsigned a0[4] = {low[0], high[0], low[1], high[1]};
    const unsigned a1[4] = {low[2], high[2], low[3], high[3]};
    multiply(sums[0], a0, b.x, b.y);
    multiply(sums[1], a1, b.z, b.w);
  }
}

/// Rows [row, row + 16) times the staged tokens, over chunks first, first + step, ... The result
/// is in mma's layout: sums[i] belongs to row 8 * (i / 2) + lane / 4 and token 2 * (lane % 4) +
/// i % 2. Rows beyond the weight repeat its last one.
template <WeightFormat kFormat, int kAhead>
__device__ __forceinline__ void multiply_rows(const WeightView& weight, std::int64_t row, int first,
                                              int step, const __nv_bfloat16* x, std::int64_t stride,
                                              int tokens, float result[4]) {
  float sums[kChains][4] = {};
  constexpr int kChunk = Words<kFormat>::kChunk;
  const int chunks = static_cast<int>((weight.cols + kChunk - 1) / kChunk);
  const std::int64_t lane_row = static_cast<int>(threadIdx.x) % 32 / 4;
  const std::int64_t low = min(row + lane_row, weight.rows - 1);
  const std::int64_t high = min(row + lane_row + 8, weight.rows - 1);
  int chunk = first;
  for (; chunk + (kAhead - 1) * step < chunks; chunk += kAhead * step) {
    Piece<kFormat> pieces[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      pieces[i] = load_piece<kFormat>(weight, low, high, chunk + i * step);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      multiply_piece<kFormat>(pieces[i], chunk + i * step, x, stride, tokens, sums);
    }
  }
  for (; chunk < chunks; chunk += step) {
    const Piece<kFormat> piece = load_piece<kFormat>(weight, low, high, chunk);
    multiply_piece<kFormat>(piece, chunk, x, stride, tokens, sums);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) result[i] = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
}

}  // namespace dsfp4::ops::cuda
