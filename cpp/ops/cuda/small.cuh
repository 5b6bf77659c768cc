// The product of 16 weight rows and up to 8 tokens by one warp, on tensor cores, whose 16-row
// operand the weights are. They are read from memory once, 16 bytes a lane, through a ring in
// shared memory; activations lie there, too.
#pragma once

#include "ops/cuda/copies.cuh"
#include "ops/cuda/words.cuh"

namespace dsfp4::ops::cuda {

constexpr int kSmallTokens = 8;
constexpr int kOfPiece = 2;                             // chunks
constexpr int kSlotBytes = kOfPiece * (1024 + 16 * 8);  // a piece: words and scales of 16 rows

/// A lane's words of two rows (g and g + 8 of the 16) in two chunks.
template <WeightFormat kFormat>
struct Piece {
  uint4 low[kOfPiece], high[kOfPiece];
  unsigned low_scales[kOfPiece], high_scales[kOfPiece];
};

/// Where a warp finds its words of 16 rows, and how they come: by cp.async to a slot of shared
/// memory, in which each lane finds its own. (Loads to registers wait for one another across
/// branches: they share a scoreboard.) What is beyond the columns is zero; rows beyond the weight
/// repeat its last one.
template <WeightFormat kFormat>
class Rows {
 public:
  using W = Words<kFormat>;
  static constexpr bool kFp4 = W::kScales > 0;

  Rows() = default;
  __device__ __forceinline__ Rows(const std::byte* data, const std::byte* scales, int rows,
                                  int cols, int row)
      : cols_(cols), own_rows_(min(16, rows - row)) {
    const int low = min(row + lane() / 4, rows - 1);
    const int high = min(row + lane() / 4 + 8, rows - 1);
    const auto bytes = static_cast<std::uint32_t>(cols / W::kLane) * 16u;
    low_ = data + std::uint64_t{bytes} * static_cast<unsigned>(low) + lane() % 4 * 16;
    high_ = data + std::uint64_t{bytes} * static_cast<unsigned>(high) + lane() % 4 * 16;
    if constexpr (kFormat == WeightFormat::kFp8Block) {
      // One scale for the whole product: its rows lie in one tile, as does the piece.
      static_assert(kOfPiece * W::kChunk == ::dsfp4::format::kFp8Tile);
      constexpr int kTile = static_cast<int>(::dsfp4::format::kFp8Tile);
      scales_ = scales + std::int64_t{low / kTile} * ((cols + kTile - 1) / kTile) * 4;
    } else if constexpr (kFp4) {  // a chunk's of row lane / 2
      const auto each = static_cast<std::uint32_t>(cols / W::kChunk * W::kScales);
      const int of = min(row + lane() / 2, rows - 1);
      scales_ = scales + std::uint64_t{each} * static_cast<unsigned>(of) + lane() % 2 * W::kScales;
    }
  }

  __device__ __forceinline__ void load(int piece, unsigned slot) const {
    const unsigned words = slot + lane() * 16;
#pragma unroll
    for (int c = 0; c < kOfPiece; ++c) {
      const int at = piece * (kOfPiece * 64) + c * 64;
      const int col = (piece * kOfPiece + c) * W::kChunk + (kFp4 ? 0 : lane() % 4 * W::kLane);
      if ((kFp4 && c == 0) || col < cols_) {  // FP4: whole chunks
        copy_of_row(words + c * 1024, low_ + at);
        copy_of_row(words + c * 1024 + 512, high_ + at);
      } else {
        store_shared16(words + c * 1024, {});
        store_shared16(words + c * 1024 + 512, {});
      }
    }
    const unsigned scales = slot + kOfPiece * 1024;
    if constexpr (kFormat == WeightFormat::kFp8Block) {
      if (lane() == 0) copy_async<4>(scales, scales_ + piece * 4);
    } else if constexpr (kFp4) {
      const unsigned own = scales + lane() * W::kScales;
      if ((piece * kOfPiece + lane() % 2) * W::kChunk < cols_) {
        copy_async<W::kScales>(own, scales_ + piece * (kOfPiece * W::kScales));
      } else {
        clear_shared<W::kScales>(own);
      }
    }
  }

  /// The words of a piece to the L2 cache.
  __device__ __forceinline__ void prefetch(int piece) const {
    if (lane() % 4 >= 2) return;  // for the quad
    const std::byte* row = lane() % 4 == 0 ? low_ : high_;
    prefetch_line(row + piece * (kOfPiece * 64));
  }

  /// The block scales of all columns to the L2 cache: a piece's are too few to be read by
  /// themselves at the memory's rate.
  __device__ __forceinline__ void prefetch_scales() const {
    if constexpr (kFp4) {
      // Of fewer rows there may be less than 16 bytes.
      if (lane() != 0 || own_rows_ < 4) return;
      prefetch_bulk(scales_, cols_ / W::kChunk * W::kScales * own_rows_);
    }
  }

  static __device__ __forceinline__ Piece<kFormat> piece(unsigned slot) {
    const unsigned words = slot + lane() * 16;
    Piece<kFormat> piece;
#pragma unroll
    for (int c = 0; c < kOfPiece; ++c) {
      piece.low[c] = load_shared16(words + c * 1024);
      piece.high[c] = load_shared16(words + c * 1024 + 512);
      const unsigned scales = slot + kOfPiece * 1024;
      if constexpr (kFormat == WeightFormat::kFp8Block) {
        piece.low_scales[c] = load_shared_word<4>(scales);
      } else if constexpr (kFp4) {
        constexpr int kOfLane = W::kScales / 4;
        const unsigned own = scales + lane() / 4 * (kOfPiece * W::kScales) + lane() % 4 * kOfLane;
        piece.low_scales[c] = load_shared_word<kOfLane>(own + c * W::kScales);
        piece.high_scales[c] = load_shared_word<kOfLane>(own + (c + 8 * kOfPiece) * W::kScales);
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
  int own_rows_ = 0;
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
__host__ __device__ constexpr int pieces_of(std::int64_t cols) {
  constexpr int kPiece = kOfPiece * Words<kFormat>::kChunk;
  return static_cast<int>((cols + kPiece - 1) / kPiece);
}

/// Where in shared memory the tokens are staged, and how many pieces a token has.
struct Staged {
  unsigned at;
  int pieces;
};

/// Up to 8 tokens, rounded to BF16, in the order of decoding; the tokens are mma's 8 columns.
template <WeightFormat kFormat>
struct TokensProduct {
  using W = Words<kFormat>;
  static constexpr int kChains = 4;  // sums added up independently, to hide the latency of mma

  /// Bytes from one token to the next: 64 off a multiple of 128, against bank conflicts.
  static __host__ __device__ constexpr int token_bytes(int pieces) {
    static_assert(kOfPiece * W::kChunk % 64 == 0);
    return pieces * (kOfPiece * W::kChunk * 2) + 64;
  }

  static __device__ __noinline__ void stage(const float* from, int cols, std::byte* to, int thread,
                                            int threads) {
    const int eights = pieces_of<kFormat>(cols) * (kOfPiece * W::kChunk / 8);
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

  /// sums += the piece's product with the tokens.
  __device__ __forceinline__ void add(const Piece<kFormat>& piece, int number, const Staged& x,
                                      int tokens) {
    const int quad = static_cast<int>(threadIdx.x) % 4;
    const int token = static_cast<int>(threadIdx.x) % 32 / 4;
    const unsigned from =
        x.at + token * token_bytes(x.pieces) + number * (kOfPiece * W::kChunk * 2) + quad * 16;
#pragma unroll
    for (int c = 0; c < kOfPiece; ++c) {
      add(piece.low[c], piece.high[c], piece.low_scales[c], piece.high_scales[c],
          from + c * W::kChunk * 2, token < tokens);
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

 private:
  // A chunk.
  __device__ __forceinline__ void add(const uint4& low_words, const uint4& high_words,
                                      unsigned low_scales, unsigned high_scales, unsigned from,
                                      bool mine) {
    const unsigned low[4] = {low_words.x, low_words.y, low_words.z, low_words.w};
    const unsigned high[4] = {high_words.x, high_words.y, high_words.z, high_words.w};
    if constexpr (kFormat == WeightFormat::kNvfp4 || kFormat == WeightFormat::kMxfp4) {
      unsigned scale_low = 0;
      unsigned scale_high = 0;
#pragma unroll
      for (int w = 0; w < 4; ++w) {  // a word: two products
        if (w == 0 || (w == 2 && kFormat == WeightFormat::kNvfp4)) {
          if constexpr (kFormat == WeightFormat::kNvfp4) {
            scale_low = nvfp4_scale((low_scales >> (4 * w)) & 0xffu);
            scale_high = nvfp4_scale((high_scales >> (4 * w)) & 0xffu);
          } else {
            scale_low = mxfp4_scale(low_scales);
            scale_high = mxfp4_scale(high_scales);
          }
        }
        const uint4 b = mine ? load_shared16(from + 64 * w) : uint4{};
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
        const uint4 b = mine ? load_shared16(from + 64 * (w / 2)) : uint4{};
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
      const float scale = __uint_as_float(low_scales);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[0][i] = fmaf(scale, tile[0][i] + tile[1][i], sums[0][i]);
    } else {
      const uint4 b = mine ? load_shared16(from) : uint4{};
      const unsigned a0[4] = {low[0], high[0], low[1], high[1]};
      const unsigned a1[4] = {low[2], high[2], low[3], high[3]};
      multiply(sums[0], a0, b.x, b.y);
      multiply(sums[1], a1, b.z, b.w);
    }
  }
};

/// What a block goes through: first, first + step, ... below `last`.
struct Tiles {
  int first, last, step;
};

/// Passes a warp's share of all tiles (of each, the pieces `first`, `first` + step, ... of all that
/// `x.pieces` says) through its `ring` of kRing slots: a slot is loaded anew as soon as it is used,
/// beyond the end of the tile, so that kRing pieces are on their way at any time. rows_of(tile)
/// says where a tile is; enter(tile) runs before its first piece is used, when its tokens must be
/// at `x`; leave(tile, product) runs after the last. All warps of a block go through all tiles, so
/// that these may synchronize.
template <WeightFormat kFormat, typename Product, int kRing, typename RowsOf, typename Enter,
          typename Leave>
__device__ __forceinline__ void stream_tiles(Tiles tiles, int first, int step, const Staged& x,
                                             int tokens, unsigned ring, const RowsOf& rows_of,
                                             const Enter& enter, const Leave& leave) {
  using R = Rows<kFormat>;
  if (tiles.first >= tiles.last) return;
  int load_tile = tiles.first;
  int load_piece = first;
  R rows = rows_of(load_tile);
  if (first == 0) rows.prefetch_scales();
  const auto load = [&](unsigned slot) {
    if (load_tile < tiles.last && first < x.pieces) {
      rows.load(load_piece, slot);
      load_piece += step;
      if (load_piece >= x.pieces) {
        load_piece = first;
        load_tile += tiles.step;
        if (load_tile < tiles.last) {
          rows = rows_of(load_tile);
          if (first == 0) rows.prefetch_scales();
        }
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int j = 0; j < kRing; ++j) load(ring + j * kSlotBytes);
  Product product;
  int slot = 0;
  for (int tile = tiles.first; tile < tiles.last; tile += tiles.step) {
    enter(tile);
    product.clear();
    for (int piece = first; piece < x.pieces; piece += step) {
      wait_copies<kRing - 1>();
      __syncwarp();  // scales are read by other lanes than those that copied them
      const Piece<kFormat> own = R::piece(ring + slot);
      __syncwarp();
      load(ring + slot);
      product.add(own, piece, x, tokens);
      slot = slot == (kRing - 1) * kSlotBytes ? 0 : slot + kSlotBytes;
    }
    leave(tile, product);
  }
}

}  // namespace dsfp4::ops::cuda
