// Absorbed latent attention on Hopper: as attention_decode.cu, but with wgmma. The first warpgroup
// computes a tile's scores and probabilities; both then add half of the columns of P V each to
// their output, 64 heads x 256 columns in registers.
//
// Short caches, of two tiles a split: each warpgroup computes the scores of one, and the splits of
// a cluster of blocks convert a part of the queries each, for all of them.
#include <cooperative_groups.h>

#include "ops/cuda/attention_decode.cuh"
#include "ops/cuda/hopper.cuh"

namespace dsfp4::ops::cuda {
namespace {

constexpr int kTileAlignment = 1024;  // of a swizzle's pattern

#if DSFP4_ON_HOPPER
constexpr int kSliceBytes = kTokens * 128;  // 64 columns of a tile

// Nine slices of 64 columns: rows of 8 units, mixed with the row as wgmma's swizzle of 128 bytes.
struct Slices {
  static __device__ __forceinline__ int offset(int row, int unit) {
    return unit / 8 * kSliceBytes + row * 128 + (unit % 8 ^ (row & 7)) * 16;
  }
};

// The block's shared memory, from where a tile may lie.
__device__ __forceinline__ std::byte* shared_tiles() {
  extern __shared__ uint4 shared_units[];
  return reinterpret_cast<std::byte*>(
      (reinterpret_cast<std::uintptr_t>(shared_units) + kTileAlignment - 1) / kTileAlignment *
      kTileAlignment);
}

// A BF16 tile, by `kOf` threads: eight have a slice of a token, and the same one of later tokens.
template <int kOf>
__device__ __forceinline__ void load_tile(const KvRows& kv, std::int32_t first_block, int tile,
                                          int visible, std::byte* to) {
  const std::byte* from = kv.blocks[first_block + tile] + kv.layer_offset;
  const int thread = static_cast<int>(threadIdx.x) % kOf;
  // Tokens that nobody has written are not read.
  const int tokens = min(visible - tile * kTokens, kTokens);
#pragma unroll 1
  for (int row = thread / 8; row < tokens; row += kOf / 8) {
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      const int unit = slice * 8 + thread % 8;
      copy_async<16>(to + Slices::offset(row, unit), from + (row * kUnits + unit) * 16);
    }
  }
}

// Scores of 64 heads x 64 tokens: scores[4n + i] is of head 16 warp + 8 (i / 2) + lane / 4 and
// token 8n + 2 (lane % 4) + i % 2.
__device__ __forceinline__ void score_tile(const std::byte* queries, const std::byte* tile,
                                           float (&scores)[32]) {
  const std::uint64_t left = tile_descriptor<128>(queries);
  const std::uint64_t right = tile_descriptor<128>(tile);
  order_registers();
#pragma unroll
  for (int k = 0; k < kWidth / 16; ++k) {
    const int at = k / 4 * kSliceBytes + k % 4 * 32;
    multiply_rows(scores, further(left, at), further(right, at), k > 0);
  }
  commit_products();
  wait_products<0>();
}

// Scales the scores of row `r` of a thread's two, those beyond `visible` to -infinity; returns the
// row's largest.
__device__ __forceinline__ float mask_and_find(float (&scores)[32], int r, float scale, int tile,
                                               int visible) {
  const int left = visible - tile * kTokens - static_cast<int>(threadIdx.x) % 4 * 2;
  float best = -INFINITY;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float& score = scores[4 * n + 2 * r + i];
      score = n * 8 + i < left ? score * scale : -INFINITY;
      best = fmaxf(best, score);
    }
  }
  best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 1));
  return fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 2));
}

// The probabilities of that row to P [64 heads, 64 tokens], a slice; returns the thread's sum.
__device__ __forceinline__ float store_chances(const float (&scores)[32], int r, float most,
                                               int row, std::byte* chances) {
  float sum = 0.0f;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float p0 = exp2_fast(scores[4 * n + 2 * r] - most);
    const float p1 = exp2_fast(scores[4 * n + 2 * r + 1] - most);
    sum += p0 + p1;
    *reinterpret_cast<unsigned*>(chances + Slices::offset(row, n) + threadIdx.x % 4 * 4) =
        pack_bf16(p0, p1);
  }
  return sum;
}

// sums += P V of a tile, the group's 256 columns; not before wait_products().
__device__ __forceinline__ void begin_values(float (&sums)[128], const std::byte* chances,
                                             const std::byte* tile, int group) {
  const std::uint64_t left = tile_descriptor<128>(chances);
  const std::uint64_t right = columns_descriptor(tile + group * 4 * kSliceBytes, kSliceBytes);
  order_registers();
#pragma unroll
  for (int k = 0; k < kTokens / 16; ++k) {
    multiply_columns(sums, further(left, k * 32), further(right, k * 16 * 128));
  }
  commit_products();
}

// A thread's share, of kOf, of an FP8 tile on its way through registers. Two tokens are nine lines
// of 128 bytes, and eight threads have a line: the fifth is half the one token's, half the other's.
template <int kOf>
struct RawUnits {
  static constexpr int kLines = 2 * kWidth / 128;
  static constexpr int kAtOnce = kOf / 8;
  static constexpr int kCount = kTokens / 2 / kAtOnce;

  // Of tile `tile`, if `there`; what is not visible is zero. Past the first-level cache, as this
  // may be before the wait.
  __device__ __forceinline__ void load(const KvRows& kv, std::int32_t first_block, int tile,
                                       bool there, int visible) {
    const int tokens = there ? visible - tile * kTokens : 0;
    const uint4* from = nullptr;
    if (there) {
      from = reinterpret_cast<const uint4*>(kv.blocks[first_block + tile] + kv.layer_offset) +
             pair(0) * kLines * 8 + threadIdx.x % 8;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int line = 0; line < kLines; ++line) {
        units[i][line] =
            token(i, line) < tokens ? __ldcg(from + (i * kAtOnce * kLines + line) * 8) : uint4{};
      }
    }
  }

  __device__ __forceinline__ void convert(std::byte* tile) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int line = 0; line < kLines; ++line) {
        const int slice = line * 2 + half() - second(line) * kSlices;
        convert_units<Slices>(units[i][line], tile, token(i, line),
                              slice * 8 + static_cast<int>(threadIdx.x) % 4 * 2);
      }
    }
  }

  static __device__ __forceinline__ int half() { return static_cast<int>(threadIdx.x) / 4 % 2; }
  static __device__ __forceinline__ int pair(int i) {
    return static_cast<int>(threadIdx.x) % kOf / 8 + i * kAtOnce;
  }
  // Whether the thread's part of a line is of the second token.
  static __device__ __forceinline__ int second(int line) {
    return line == kLines / 2 ? half() : line > kLines / 2;
  }
  static __device__ __forceinline__ int token(int i, int line) {
    return pair(i) * 2 + second(line);
  }

  uint4 units[kCount][kLines];
};

__device__ __forceinline__ void write_outputs(const Partial& partial, std::int64_t first,
                                              const float (&sums)[128], float low, float high) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int n = 0; n < 32; ++n) {
    partial.store(first, thread / 32 % 4, thread / 128 * 32 + n, thread % 32, sums + 4 * n, low,
                  high);
  }
}
#endif

template <bool kFp8>
__global__ void __launch_bounds__(kThreads, 1)
    hopper_decode_kernel(MlaShape shape, KvRows kv, ConstMatrix q_abs, ConstMatrix q, int splits,
                         Partial partial) {
#if DSFP4_ON_HOPPER
  std::byte* queries = shared_tiles();
  std::byte* tiles = queries + kTileBytes;
  std::byte* chances = tiles + 2 * kTileBytes;  // P [64 heads, 64 tokens], a slice
  __shared__ float correction[kHeads];
  __shared__ float head_largest[kHeads];
  __shared__ float head_total[kHeads];

  const int thread = static_cast<int>(threadIdx.x);
  const int group = thread / 128;
  const int lane = thread % 32;
  const int head = thread / 32 % 4 * 16 + lane / 4;  // and 8 more
  // Blocks of the next kernel that began early would crowd where the first of these end.
  wait_for_inputs();
  const RowPlace place = kv.rows[blockIdx.z];
  const Work work = work_of_block(place, splits);

  const auto stage = [&](int t) { return tiles + t % 2 * kTileBytes; };
  RawUnits<kThreads> raw;  // FP8: of the tile after the next
  const auto load_raw = [&](int t) {
    raw.load(kv, place.first_block, t, t < work.end, work.visible);
  };
  if constexpr (kFp8) {
    load_raw(work.begin);
  } else {
    if (work.begin < work.end) {
      load_tile<kThreads>(kv, place.first_block, work.begin, work.visible, stage(work.begin));
    }
    commit_copies();
  }
  load_queries<Slices>(shape, work, q_abs, q, 0, [&](int at, const uint4& unit) {
    *reinterpret_cast<uint4*>(queries + at) = unit;
  });

  float sums[128];
#pragma unroll
  for (float& sum : sums) sum = 0.0f;
  constexpr float kLog2E = 1.44269504f;
  const float scale = shape.softmax_scale * kLog2E * (kFp8 ? kv.scale : 1.0f);
  float largest[2] = {-INFINITY, -INFINITY};
  float total[2] = {};
  if constexpr (kFp8) {
    raw.convert(stage(work.begin));
    load_raw(work.begin + 1);
    publish_to_products();
  }
  for (int t = work.begin; t < work.end; ++t) {
    std::byte* tile = stage(t);
    if constexpr (!kFp8) {
      wait_copies<0>();
      publish_to_products();
    }
    __syncthreads();   // the tile is there, and the other stage is free
    if (group == 1) {  // while the other computes scores
      if constexpr (kFp8) {
        raw.convert(stage(t + 1));
        load_raw(t + 2);
        publish_to_products();
      } else {
        if (t + 1 < work.end) {
          load_tile<kThreads / 2>(kv, place.first_block, t + 1, work.visible, stage(t + 1));
        }
        commit_copies();
      }
    }
    if constexpr (!kFp8) {
      if ((t + 1) * kTokens > work.visible) {
        clear_tail<Slices>(tile, t * kTokens, work.visible);
        publish_to_products();
        __syncthreads();
      }
    }

    if (group == 0) {
      float scores[32];
      score_tile(queries, tile, scores);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // A tile has a visible token, so the best is finite. Until it is 2^8 times as likely as
        // what the sums are relative to, they are left as they are.
        const float best = mask_and_find(scores, r, scale, t, work.visible);
        const float now = best > largest[r] + 8.0f ? best : largest[r];
        const float change = exp2_fast(largest[r] - now);
        largest[r] = now;
        const int row = head + 8 * r;
        const float sum = store_chances(scores, r, now, row, chances);
        total[r] = total[r] * change + sum;
        if (lane % 4 == 0) correction[row] = change;
      }
      publish_to_products();
    }
    __syncthreads();
    const float low = correction[head];
    const float high = correction[head + 8];
    if (__any_sync(0xffffffffu, low != 1.0f || high != 1.0f)) {
#pragma unroll
      for (int i = 0; i < 128; ++i) sums[i] *= i % 4 < 2 ? low : high;
    }
    begin_values(sums, chances, tile, group);
    if constexpr (kFp8) {
      if (group == 0) {
        raw.convert(stage(t + 1));
        load_raw(t + 2);
        publish_to_products();
      }
    }
    wait_products<0>();
  }

  // What each head's probabilities are relative to, and their sum.
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
    total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
    if (group == 0 && lane % 4 == 0) {
      head_largest[head + 8 * r] = largest[r];
      head_total[head + 8 * r] = total[r];
    }
  }
  __syncthreads();
  const std::int64_t first = Partial::first(shape, work, splits);
  const float unscale = kFp8 ? kv.scale : 1.0f;
  write_outputs(partial, first, sums, average_of(head_total[head], unscale),
                average_of(head_total[head + 8], unscale));
  if (thread < kHeads) {
    partial.largest[first + thread] = head_largest[thread];
    partial.total[first + thread] = head_total[thread];
  }
#endif
}

// Each split has two tiles at most, which both lie in shared memory.
template <bool kFp8>
__global__ void __launch_bounds__(kThreads, 1)
    hopper_short_kernel(MlaShape shape, KvRows kv, ConstMatrix q_abs, ConstMatrix q, int splits,
                        Partial partial) {
#if DSFP4_ON_HOPPER
  std::byte* queries = shared_tiles();
  std::byte* tiles = queries + kTileBytes;
  __shared__ float group_largest[2][kHeads];
  __shared__ float group_total[2][kHeads];
  const auto cluster = cooperative_groups::this_cluster();

  const int thread = static_cast<int>(threadIdx.x);
  const int group = thread / 128;
  const int lane = thread % 32;
  const int head = thread / 32 % 4 * 16 + lane / 4;  // and 8 more
  const RowPlace place = kv.rows[blockIdx.z];
  const Work work = work_of_block(place, splits);
  const int own = work.begin + group;  // tile
  const bool has = own < work.end;
  std::byte* tile = tiles + group * kTileBytes;

  // The cache is older than what this kernel waits for.
  if constexpr (kFp8) {
    RawUnits<128> raw;
    raw.load(kv, place.first_block, own, has, work.visible);
    if (has) raw.convert(tile);
  } else {
    for (int t = work.begin; t < work.end; ++t) {
      load_tile<kThreads>(kv, place.first_block, t, work.visible,
                          tiles + (t - work.begin) * kTileBytes);
    }
    commit_copies();
  }

  cluster.sync();     // all of them have begun
  wait_for_inputs();  // queries
  let_next_begin();   // there are fewer blocks than multiprocessors: room for the next kernel's
  constexpr int kShare = kHeads / kQuerySharers;
  const int first = static_cast<int>(cluster.block_rank()) * kShare;
  load_queries<Slices, kShare>(shape, work, q_abs, q, first, [&](int at, const uint4& unit) {
#pragma unroll
    for (int other = 0; other < kQuerySharers; ++other) {
      *reinterpret_cast<uint4*>(cluster.map_shared_rank(queries, other) + at) = unit;
    }
  });
  cluster.sync();
  if constexpr (!kFp8) {
    wait_copies<0>();
    const int last = work.end - 1;
    if (work.begin < work.end && (last + 1) * kTokens > work.visible) {
      clear_tail<Slices>(tiles + (last - work.begin) * kTileBytes, last * kTokens, work.visible);
    }
  }
  publish_to_products();
  __syncthreads();

  constexpr float kLog2E = 1.44269504f;
  const float scale = shape.softmax_scale * kLog2E * (kFp8 ? kv.scale : 1.0f);
  float scores[32];
  float largest[2] = {-INFINITY, -INFINITY};
  if (has) {
    score_tile(queries, tile, scores);
#pragma unroll
    for (int r = 0; r < 2; ++r) largest[r] = mask_and_find(scores, r, scale, own, work.visible);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (lane % 4 == 0) group_largest[group][head + 8 * r] = largest[r];
  }
  __syncthreads();  // and nobody reads queries any more: probabilities take their place
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = head + 8 * r;
    float total = 0.0f;
    if (has) {
      const float most = fmaxf(group_largest[0][row], group_largest[1][row]);
      total = store_chances(scores, r, most, row, queries + group * kExchangeBytes);
    }
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    if (lane % 4 == 0) group_total[group][row] = total;
  }
  publish_to_products();
  __syncthreads();

  float sums[128];
#pragma unroll
  for (float& sum : sums) sum = 0.0f;
  for (int t = 0; t < work.end - work.begin; ++t) {
    begin_values(sums, queries + t * kExchangeBytes, tiles + t * kTileBytes, group);
    wait_products<0>();
  }
  const std::int64_t at = Partial::first(shape, work, splits);
  const auto total_of = [&](int h) { return group_total[0][h] + group_total[1][h]; };
  const float unscale = kFp8 ? kv.scale : 1.0f;
  write_outputs(partial, at, sums, average_of(total_of(head), unscale),
                average_of(total_of(head + 8), unscale));
  if (thread < kHeads) {
    partial.largest[at + thread] = fmaxf(group_largest[0][thread], group_largest[1][thread]);
    partial.total[at + thread] = total_of(thread);
  }
#endif
}

}  // namespace

bool latent_hopper(Device* device, const MlaShape& shape, const KvRows& kv, ConstMatrix q_abs,
                   ConstMatrix q, int splits, bool short_cache, const Partial& partial) {
  const bool fp8 = kv.format == KvFormat::kFp8;
  const auto kernel = short_cache
                          ? (fp8 ? hopper_short_kernel<true> : hopper_short_kernel<false>)
                          : (fp8 ? hopper_decode_kernel<true> : hopper_decode_kernel<false>);
  constexpr int kBytes = kSharedBytes + kTileAlignment;
  DSFP4_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(head_groups(shape)),
                  static_cast<unsigned>(kv.count));
  DSFP4_TRY(launch_clusters(device, kernel, grid, kThreads, kBytes, short_cache ? kQuerySharers : 1,
                            shape, kv, q_abs, q, splits, partial));
  return true;
}

}  // namespace dsfp4::ops::cuda
