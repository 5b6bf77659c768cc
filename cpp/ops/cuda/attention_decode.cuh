// What the two kernels of absorbed latent attention share: attention_decode.cu with mma.sync, and
// attention_decode_hopper.cu with wgmma. DeepSeek's geometry only, 512 + 64 values a token.
//
// A block holds in shared memory the queries of its 64 heads [64, 576] and tiles of 64 tokens
// [64, 576], all BF16, in units of 16 bytes. Where unit `unit` of a row lies is the kernel's: a
// type with offset(row, unit).
#pragma once

#include "ops/cuda/kernels.h"
#include "ops/cuda/large.cuh"
#include "ops/cuda/workspaces.h"

namespace dsfp4::ops::cuda {

constexpr int kHeads = kBlockHeads;
constexpr int kTokens = 64;  // of a tile: one block of the cache
constexpr int kLatent = 512;
constexpr int kWidth = 576;
constexpr int kTileBytes = kTokens * kWidth * 2;
constexpr int kRawBytes = kTokens * kWidth;  // FP8
constexpr int kThreads = 256;
constexpr int kUnits = kWidth / 8;
constexpr int kSlices = kUnits / 8;  // of 64 values of a token or query
static_assert(kTokens == kKvBlockTokens);

static_assert(kTileBytes == 2 * kRawBytes);
// Shared memory: queries, then two tiles, or with mma.sync one tile and two raw ones (FP8); and 8
// KB of scores or probabilities on their way from warp to warp.
constexpr int kExchangeBytes = kHeads * kTokens * 2;
constexpr int kSharedBytes = 3 * kTileBytes + kExchangeBytes;

// What one block works on.
struct Work {
  std::int64_t row, first_head;
  int split, visible, begin, end;  // tiles [begin, end)
};

// The block's row and head of queries, and its share of the tiles.
__device__ __forceinline__ Work work_of_block(const RowPlace& place, int splits) {
  Work work;
  work.split = static_cast<int>(blockIdx.x);
  work.first_head = std::int64_t{blockIdx.y} * kHeads;
  work.row = blockIdx.z;
  work.visible = place.position + 1;
  const int all = (work.visible + kTokens - 1) / kTokens;
  const int each = (all + splits - 1) / splits;
  work.begin = min(work.split * each, all);
  work.end = min(work.begin + each, all);
  return work;
}

// Heads in whole groups.
__host__ __device__ inline std::int64_t head_groups(const MlaShape& shape) {
  return (shape.heads + kHeads - 1) / kHeads;
}
__host__ __device__ inline std::int64_t padded_heads(const MlaShape& shape) {
  return head_groups(shape) * kHeads;
}

// What each split found: [rows, splits, padded heads], and outputs with 512 values more. These are
// averages of cached values, in FP16, as writing them is a good part of a short cache's time; they
// lie as mma leaves them: for 16 heads and 8 columns four values of each lane, of head lane / 4 and
// the columns 2 (lane % 4) and + 1, then of head lane / 4 + 8.
struct Partial {
  __half* outputs;
  float* largest;
  float* total;

  // Where the work's first head has its numbers.
  static __device__ __forceinline__ std::int64_t first(const MlaShape& shape, const Work& work,
                                                       int splits) {
    return (work.row * splits + work.split) * padded_heads(shape) + work.first_head;
  }
  // The lane's four of heads [head + 16 sixteen, + 16) and columns [8 eight, + 8).
  __device__ __forceinline__ uint2* values(std::int64_t head, int sixteen, int eight,
                                           int lane) const {
    return reinterpret_cast<uint2*>(outputs + (head + 16 * sixteen) * kLatent) + eight * 32 + lane;
  }
  // Sums of probabilities times values, times what makes averages of them for each of two heads.
  __device__ __forceinline__ void store(std::int64_t head, int sixteen, int eight, int lane,
                                        const float* sums, float low, float high) const {
    const __half2 first = __floats2half2_rn(sums[0] * low, sums[1] * low);
    const __half2 second = __floats2half2_rn(sums[2] * high, sums[3] * high);
    *values(head, sixteen, eight, lane) = {*reinterpret_cast<const unsigned*>(&first),
                                           *reinterpret_cast<const unsigned*>(&second)};
  }
};

// A split without tokens has the average 0.
__device__ __forceinline__ float average_of(float total, float unscale) {
  return total == 0.0f ? 0.0f : unscale / total;
}

// Queries of heads [first, first + count) of the block's 64 to shared memory, 8 values a unit:
// store(offset, unit).
template <class Layout, int kCount = kHeads, class Store>
__device__ __forceinline__ void load_queries(const MlaShape& shape, const Work& work,
                                             ConstMatrix q_abs, ConstMatrix q, int first_of_block,
                                             const Store& store) {
  // Eight threads have a slice of a query.
  constexpr int kAtOnce = kThreads / 8;
  static_assert(kCount % kAtOnce == 0 || kAtOnce % kCount == 0);
  constexpr int kSlicesAtOnce = kCount < kAtOnce ? kAtOnce / kCount : 1;
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int first = 0; first < kCount; first += kAtOnce) {
    const int h = first_of_block + first + thread / 8 % kCount;
    const std::int64_t head = work.first_head + h;
    const float* latent = q_abs.data + work.row * q_abs.stride + head * kLatent;
    const float* rope =
        q.data + work.row * q.stride + head * shape.qk_head_dim() + shape.qk_nope_head_dim;
#pragma unroll
    for (int s = 0; s < kSlices; s += kSlicesAtOnce) {
      const int slice = s + (kSlicesAtOnce > 1 ? thread / 8 / kCount : 0);
      if (slice >= kSlices) break;
      uint4 packed{};
      if (head < shape.heads) {
        const float* from = (slice < kSlices - 1 ? latent + slice * 64 : rope) + thread % 8 * 8;
        const float4 low = *reinterpret_cast<const float4*>(from);
        const float4 high = *reinterpret_cast<const float4*>(from + 4);
        packed = {pack_bf16(low.x, low.y), pack_bf16(low.z, low.w), pack_bf16(high.x, high.y),
                  pack_bf16(high.z, high.w)};
      }
      store(Layout::offset(h, slice * 8 + thread % 8), packed);
    }
  }
}

// 16 values in E4M3 to BF16, as units `unit` and `unit` + 1 of a row; the cache's multiplier goes
// to the scores and the sums.
template <class Layout>
__device__ __forceinline__ void convert_units(const uint4& words, std::byte* to, int row,
                                              int unit) {
  const unsigned from[4] = {words.x, words.y, words.z, words.w};
  unsigned out[8];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    unsigned pairs[2];  // (0, 2), (1, 3)
    decode_fp8(from[w], pairs);
    out[2 * w] = __byte_perm(pairs[0], pairs[1], 0x5410);
    out[2 * w + 1] = __byte_perm(pairs[0], pairs[1], 0x7632);
  }
  *reinterpret_cast<uint4*>(to + Layout::offset(row, unit)) = {out[0], out[1], out[2], out[3]};
  *reinterpret_cast<uint4*>(to + Layout::offset(row, unit + 1)) = {out[4], out[5], out[6], out[7]};
}

// Tokens beyond `visible` may never have been written: their values must be finite.
template <class Layout>
__device__ __forceinline__ void clear_tail(std::byte* tile, int first, int visible) {
  for (int i = static_cast<int>(threadIdx.x); i < kTokens * kUnits; i += kThreads) {
    if (first + i / kUnits >= visible) {
      *reinterpret_cast<uint4*>(tile + Layout::offset(i / kUnits, i % kUnits)) = uint4{};
    }
  }
}

/// attention_decode_hopper.cu, for GPUs with wgmma. `short_cache`: no split has more than two
/// tiles, and splits come in multiples of kQuerySharers.
constexpr int kQuerySharers = 4;
bool latent_hopper(Device* device, const MlaShape& shape, const KvRows& kv, ConstMatrix q_abs,
                   ConstMatrix q, int splits, bool short_cache, const Partial& partial);

}  // namespace dsfp4::ops::cuda
