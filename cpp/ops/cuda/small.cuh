// The product of 16 weight rows and up to 8 tokens by one warp, on tensor cores, whose 16-row
// operand the weights are. They are read from memory once, 16 bytes a lane, through a ring in
// shared memory; activations lie there, too.
#pragma once

#include "ops/cuda/copies.cuh"
#include "ops/cuda/words.cuh"

namespace dsfp4::ops::cuda {

constexpr int kSmallTokens = 8;
constexpr int kRing = 6;                   // pieces of a warp on their way
constexpr int kSlotBytes = 1024 + 16 * 8;  // a piece: words and scales of 16 rows
constexpr int kSmallRingBytes = kRing * kSlotBytes;

/// A lane's words of two rows (g and g + 8 of the 16) in one chunk.
template <WeightFormat kFormat>
struct Piece {
  uint4 low, high;
  unsigned low_scales, high_scales;
};

/// Where a warp finds its words of 16 rows, and how they come: by cp.async to a slot of shared
/// memory, in which each lane finds its own, and 8 bytes of scales a row. (Loads to registers wait
/// for one another across branches: they share a scoreboard.) Rows beyond the weight repeat its
/// last one.
template <WeightFormat kFormat>
class Rows {
 public:
  using W = Words<kFormat>;
  static constexpr bool kFp4 = W::kScales > 0;

  Rows() = default;
  __device__ __forceinline__ Rows(const std::byte* data, const std::byte* scales, int rows,
                                  int cols, int row)
      : cols_(cols) {
    const int low = min(row + lane() / 4, rows - 1);
    const int high = min(row + lane() / 4 + 8, rows - 1);
    const auto bytes = static_cast<std::uint32_t>(cols / W::kLane) * 16u;
    low_ = data + std::uint64_t{bytes} * static_cast<unsigned>(low) + lane() % 4 * 16;
    high_ = data + std::uint64_t{bytes} * static_cast<unsigned>(high) + lane() % 4 * 16;
    if constexpr (kFormat == WeightFormat::kFp8Block) {
      // One scale for the whole product: its rows lie in one tile, as does the chunk.
      constexpr int kTile = static_cast<int>(::dsfp4::format::kFp8Tile);
      scales_ = scales + std::int64_t{low / kTile} * ((cols + kTile - 1) / kTile) * 4;
    } else if constexpr (W::kScales > 0) {
      // Of row g, or, for a quad's second lane, of row g + 8.
      const auto each = static_cast<std::uint32_t>(cols / W::kLane * (W::kScales / 4));
      scales_ = scales + std::uint64_t{each} * static_cast<unsigned>(lane() % 4 == 1 ? high : low);
    }
  }

  __device__ __forceinline__ void load(int chunk, std::byte* slot) const {
    if constexpr (kFp4) {  // whole chunks
      copy_of_row(slot + lane() * 16, low_ + chunk * 64);
      copy_of_row(slot + 512 + lane() * 16, high_ + chunk * 64);
    } else {
      const int bytes = chunk * W::kChunk + lane() % 4 * W::kLane < cols_ ? 16 : 0;
      copy_or_clear(slot + lane() * 16, low_ + (bytes == 0 ? 0 : chunk * 64), bytes);
      copy_or_clear(slot + 512 + lane() * 16, high_ + (bytes == 0 ? 0 : chunk * 64), bytes);
    }
    if constexpr (kFormat == WeightFormat::kFp8Block) {
      constexpr int kTile = static_cast<int>(::dsfp4::format::kFp8Tile);
      if (lane() == 0) copy_async<4>(slot + 1024, scales_ + chunk / (kTile / W::kChunk) * 4);
    } else if constexpr (W::kScales > 0) {
      if (lane() % 4 < 2) {
        copy_async<W::kScales>(slot + 1024 + lane() % 4 * 64 + lane() / 4 * 8,
                               scales_ + chunk * W::kScales);
      }
    }
  }

  static __device__ __forceinline__ Piece<kFormat> piece(const std::byte* slot) {
    const auto* words = reinterpret_cast<const uint4*>(slot) + lane();
    Piece<kFormat> piece{words[0], words[32], 0, 0};
    if constexpr (kFormat == WeightFormat::kFp8Block) {
      piece.low_scales = *reinterpret_cast<const unsigned*>(slot + 1024);
    } else if constexpr (W::kScales > 0) {
      const auto* scales = slot + 1024 + lane() / 4 * 8 + lane() % 4 * (W::kScales / 4);
      if constexpr (kFormat == WeightFormat::kNvfp4) {
        piece.low_scales = *reinterpret_cast<const unsigned short*>(scales);
        piece.high_scales = *reinterpret_cast<const unsigned short*>(scales + 64);
      } else {
        piece.low_scales = static_cast<unsigned>(scales[0]);
        piece.high_scales = static_cast<unsigned>(scales[64]);
      }
    }
    return piece;
  }

 private:
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }

  const std::byte* low_ = nullptr;
  const std::byte* high_ = nullptr;
  const std::byte* scales_ = nullptr;
  int cols_ = 0;
};

/// Whether the rows of `weight` can be read that way.
inline bool has_pieces(const WeightView& weight) {
  const bool fp4 = weight.format == WeightFormat::kNvfp4 || weight.format == WeightFormat::kMxfp4;
  return has_words(weight) && (!fp4 || (weight.cols % 128 == 0 &&
                                        reinterpret_cast<std::uintptr_t>(weight.scales) % 8 == 0));
}

/// Calls use(i, values) for eights thread, thread + threads, ... of `cols` values (beyond: zeros),
/// by whole warps, up to 31 beyond `eights`. Several are loaded before the first is used.
template <typename Use>
__device__ __forceinline__ void for_eights(const float* from, int eights, int cols, int thread,
                                           int threads, const Use& use) {
  constexpr int kTogether = 4;
  for (int first = thread; first - thread % 32 < eights; first += kTogether * threads) {
    float4 values[kTogether][2];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int eight = first + j * threads;
      values[j][0] = values[j][1] = float4{};
      if (eight * 8 < cols) {
        values[j][0] = reinterpret_cast<const float4*>(from)[eight * 2];
        values[j][1] = reinterpret_cast<const float4*>(from)[eight * 2 + 1];
      }
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int eight = first + j * threads;
      if (eight - thread % 32 >= eights) break;
      const float all[8] = {values[j][0].x, values[j][0].y, values[j][0].z, values[j][0].w,
                            values[j][1].x, values[j][1].y, values[j][1].z, values[j][1].w};
      use(eight, all);
    }
  }
}

/// Whether the rows of `x` can be read four values at a time.
inline bool has_fours(ConstMatrix x) {
  return reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && x.stride % 4 == 0;
}

template <WeightFormat kFormat>
__host__ __device__ constexpr int chunks_of(std::int64_t cols) {
  return static_cast<int>((cols + Words<kFormat>::kChunk - 1) / Words<kFormat>::kChunk);
}

/// Up to 8 tokens, rounded to BF16, in the order of decoding; the tokens are mma's 8 columns.
template <WeightFormat kFormat>
struct TokensProduct {
  using W = Words<kFormat>;
  static constexpr int kChains = 4;  // sums added up independently, to hide the latency of mma

  /// Bytes from one token to the next: 64 off a multiple of 128, against bank conflicts.
  static __host__ __device__ constexpr int token_bytes(std::int64_t cols) {
    return (chunks_of<kFormat>(cols) * W::kChunk + 63) / 64 * 128 + 64;
  }

  static __device__ __noinline__ void stage(const float* from, int cols, std::byte* to, int thread,
                                            int threads) {
    const int eights = chunks_of<kFormat>(cols) * (W::kChunk / 8);
    for_eights(from, eights, cols, thread, threads, [&](int eight, const float values[8]) {
      if (eight >= eights) return;
      const int in = eight * 8 % W::kChunk;
      // Lane's piece of 16 bytes lies beside the other lanes' pieces of that number.
      const int at = eight - in / 8 + in % W::kLane / 8 * 4 + in / W::kLane;
      float ordered[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) ordered[decoded_place<kFormat>(i)] = values[i];
      reinterpret_cast<uint4*>(to)[at] = {
          pack_bf16(ordered[0], ordered[1]), pack_bf16(ordered[2], ordered[3]),
          pack_bf16(ordered[4], ordered[5]), pack_bf16(ordered[6], ordered[7])};
    });
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int c = 0; c < kChains; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[c][i] = 0.0f;
    }
  }

  /// sums += the chunk's product with the tokens staged at `x`.
  __device__ __forceinline__ void add(const Piece<kFormat>& piece, int chunk, const std::byte* x,
                                      int cols, int tokens) {
    const int quad = static_cast<int>(threadIdx.x) % 4;
    const int token = static_cast<int>(threadIdx.x) % 32 / 4;
    const auto* from =
        reinterpret_cast<const uint4*>(x + token * token_bytes(cols) + chunk * W::kChunk * 2) +
        quad;
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

  /// In mma's layout: result[i] belongs to row 8 * (i / 2) + lane / 4 and token 2 * (lane % 4) +
  /// i % 2.
  __device__ __forceinline__ void finish(float result[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) result[i] = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
  }

  static __host__ __device__ float epilogue(float global_scale) {
    return word_epilogue(kFormat, global_scale);
  }

  float sums[kChains][4];
};

/// A block's tiles of 16 rows: first, first + step, ... below `last`.
struct Tiles {
  int first, last, step;
};

/// Passes a warp's share of all tiles (chunks `first`, `first` + step, ... of each) through its
/// `ring` of kRing slots: a slot is loaded anew as soon as it is used, beyond the end of the tile,
/// so that kRing pieces are on their way at any time. rows_of(tile) says where a tile is;
/// enter(tile) runs before its first piece is used and returns where its tokens are staged;
/// leave(tile, product) runs after the last. All warps of a block go through all tiles, so that
/// these may synchronize.
template <WeightFormat kFormat, typename Product, typename RowsOf, typename Enter, typename Leave>
__device__ __forceinline__ void stream_tiles(Tiles tiles, int first, int step, int cols, int tokens,
                                             std::byte* ring, const RowsOf& rows_of,
                                             const Enter& enter, const Leave& leave) {
  using R = Rows<kFormat>;
  if (tiles.first >= tiles.last) return;
  const int chunks = chunks_of<kFormat>(cols);
  int load_tile = tiles.first;
  int load_chunk = first;
  R rows = rows_of(load_tile);
  const auto load = [&](std::byte* slot) {
    if (load_tile < tiles.last && first < chunks) {
      rows.load(load_chunk, slot);
      load_chunk += step;
      if (load_chunk >= chunks) {
        load_chunk = first;
        load_tile += tiles.step;
        if (load_tile < tiles.last) rows = rows_of(load_tile);
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int j = 0; j < kRing; ++j) load(ring + j * kSlotBytes);
  Product product;
  int slot = 0;
  for (int tile = tiles.first; tile < tiles.last; tile += tiles.step) {
    const std::byte* x = enter(tile);
    product.clear();
    // Two at a time, so that their products overlap, and the last one.
    const auto following = [](int at) {
      return at == (kRing - 1) * kSlotBytes ? 0 : at + kSlotBytes;
    };
    int chunk = first;
    for (; chunk + step < chunks; chunk += 2 * step) {
      const int second = following(slot);
      wait_copies<kRing - 2>();
      __syncwarp();  // scales are read by other lanes than those that copied them
      const Piece<kFormat> pieces[2] = {R::piece(ring + slot), R::piece(ring + second)};
      __syncwarp();
      load(ring + slot);
      load(ring + second);
      product.add(pieces[0], chunk, x, cols, tokens);
      product.add(pieces[1], chunk + step, x, cols, tokens);
      slot = following(second);
    }
    if (chunk < chunks) {
      wait_copies<kRing - 1>();
      __syncwarp();
      const Piece<kFormat> piece = R::piece(ring + slot);
      __syncwarp();
      load(ring + slot);
      product.add(piece, chunk, x, cols, tokens);
      slot = following(slot);
    }
    leave(tile, product);
  }
}

}  // namespace dsfp4::ops::cuda
