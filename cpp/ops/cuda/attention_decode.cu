// Absorbed latent attention of DeepSeek's geometry (512 + 64 values a token), flash-decoding: the
// cache is split over blocks, each keeps running sums for 64 heads, and a second kernel adds the
// splits in order. Heads are the rows of mma.sync. Floor: the larger of the cache's bytes and
// 278,528 operations a token for 128 heads.
//
// Of a block's 8 warps, each ends up with the scores of 16 heads x 32 tokens, and keeps the
// output's 64 heads x 64 columns in registers. Probabilities take the place of the tile's rotated
// keys once these are used.
#include "ops/cuda/attention_decode.cuh"
#include "ops/cuda/workspaces.h"

namespace dsfp4::ops::cuda {
namespace {

// Rows of 72 units, mixed with the row against bank conflicts.
struct Rows72 {
  static __device__ __forceinline__ int offset(int row, int unit) {
    return row * (kWidth * 2) + (unit ^ (row & 7)) * 16;
  }
};

template <bool kFp8>
__device__ __forceinline__ void load_tile(const KvRows& kv, std::int32_t first_block, int tile,
                                          int visible, std::byte* to) {
  // Tokens that nobody has written are not read.
  const int tokens = min(visible - tile * kTokens, kTokens);
  const std::byte* from = kv.blocks[first_block + tile] + kv.layer_offset;
  if constexpr (kFp8) {
    for (int i = static_cast<int>(threadIdx.x); i < tokens * (kUnits / 2); i += kThreads) {
      copy_async<16>(to + i * 16, from + i * 16);
    }
  } else {
#pragma unroll 6
    for (int i = static_cast<int>(threadIdx.x); i < tokens * kUnits; i += kThreads) {
      copy_async<16>(to + Rows72::offset(i / kUnits, i % kUnits), from + i * 16);
    }
  }
}

__device__ __forceinline__ void convert_tile(const std::byte* raw, std::byte* to) {
  for (int i = static_cast<int>(threadIdx.x); i < kRawBytes / 16; i += kThreads) {
    convert_units<Rows72>(*reinterpret_cast<const uint4*>(raw + i * 16), to, i / (kUnits / 2),
                          i % (kUnits / 2) * 2);
  }
}

__device__ __forceinline__ void load_transposed(unsigned out[4], const void* from) {
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(from));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared));
}

// Scores of heads [16 a, + 16) and tokens [32 b, + 32) in mma's layout. Warps work in pairs: each
// computes 32 heads over half of the columns, so that what is read from shared memory serves twice
// as many products, and gives the other the 16 heads that are not its own. `exchange` has 64 bytes
// for each lane of a pair.
__device__ __forceinline__ void score_tile(const std::byte* queries, const std::byte* tile,
                                           float4* exchange, float scores[4][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int half = warp / 4;   // of the columns
  const int heads = warp % 2;  // 32 of them
  const int b = warp / 2 % 2;  // 32 tokens
  const int q_row = heads * 32 + lane % 16;
  const int k_row = b * 32 + lane / 16 * 8 + lane % 8;
  float sums[2][4][4];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
    }
  }
  constexpr int kSteps = kWidth / 16 / 2;
#pragma unroll 3
  for (int step = 0; step < kSteps; ++step) {
    const int k = half * kSteps + step;
    unsigned left[2][4];
    unsigned right[2][4];
    load_matrices(left[0], queries + Rows72::offset(q_row, 2 * k + lane / 16));
    load_matrices(left[1], queries + Rows72::offset(q_row + 16, 2 * k + lane / 16));
    load_matrices(right[0], tile + Rows72::offset(k_row, 2 * k + lane / 8 % 2));
    load_matrices(right[1], tile + Rows72::offset(k_row + 16, 2 * k + lane / 8 % 2));
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      multiply(sums[m][0], left[m], right[0][0], right[0][1]);
      multiply(sums[m][1], left[m], right[0][2], right[0][3]);
      multiply(sums[m][2], left[m], right[1][0], right[1][1]);
      multiply(sums[m][3], left[m], right[1][2], right[1][3]);
    }
  }
  // The second of a pair hands over heads 0..15 of the 32, then the first its heads 16..31, through
  // the same place; the first half's sum comes first in both.
  float4* slot = exchange + (warp % 4 * 4) * 32 + lane;
  if (half == 1) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      slot[n * 32] = {sums[0][n][0], sums[0][n][1], sums[0][n][2], sums[0][n][3]};
    }
  }
  __syncthreads();
  if (half == 0) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float4 other = slot[n * 32];
      slot[n * 32] = {sums[1][n][0], sums[1][n][1], sums[1][n][2], sums[1][n][3]};
      scores[n][0] = sums[0][n][0] + other.x;
      scores[n][1] = sums[0][n][1] + other.y;
      scores[n][2] = sums[0][n][2] + other.z;
      scores[n][3] = sums[0][n][3] + other.w;
    }
  }
  __syncthreads();
  if (half == 1) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float4 other = slot[n * 32];
      scores[n][0] = other.x + sums[1][n][0];
      scores[n][1] = other.y + sums[1][n][1];
      scores[n][2] = other.z + sums[1][n][2];
      scores[n][3] = other.w + sums[1][n][3];
    }
  }
}

// sums += P V for columns [64 warp, + 64).
__device__ __forceinline__ void add_values(const std::byte* tile, int warp, float sums[4][8][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int k = 0; k < kTokens / 16; ++k) {
    unsigned p[4][4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      load_matrices(p[m],
                    tile + Rows72::offset(m * 16 + lane % 16, kLatent / 8 + 2 * k + lane / 16));
    }
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      unsigned v[4];
      load_transposed(
          v, tile + Rows72::offset(k * 16 + lane / 8 % 2 * 8 + lane % 8, warp * 8 + n + lane / 16));
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        multiply(sums[m][n], p[m], v[0], v[1]);
        multiply(sums[m][n + 1], p[m], v[2], v[3]);
      }
    }
  }
}

template <bool kFp8>
__global__ void __launch_bounds__(kThreads, 1)
    decode_kernel(MlaShape shape, KvRows kv, ConstMatrix q_abs, ConstMatrix q, int splits,
                  Partial partial) {
  extern __shared__ uint4 shared_units[];
  auto* queries = reinterpret_cast<std::byte*>(shared_units);
  std::byte* tiles = queries + kTileBytes;
  auto* exchange = reinterpret_cast<float4*>(tiles + 2 * kTileBytes);
  __shared__ float tile_largest[2][kHeads];  // of each half of the tokens
  __shared__ float correction[kHeads];
  __shared__ float totals[2][kHeads];

  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int a = warp % 2 * 2 + warp / 4;  // whose scores it ends up with: heads [16 a, + 16)
  const int b = warp / 2 % 2;             // and tokens [32 b, + 32) of a tile
  // Blocks of the next kernel that began early would crowd where the first of these end.
  wait_for_inputs();
  const RowPlace place = kv.rows[blockIdx.z];
  const Work work = work_of_block(place, splits);

  const auto raw_stage = [&](int tile) {
    return kFp8 ? tiles + kTileBytes + tile % 2 * kRawBytes : tiles + tile % 2 * kTileBytes;
  };
  if (work.begin < work.end) {
    load_tile<kFp8>(kv, place.first_block, work.begin, work.visible, raw_stage(work.begin));
  }
  commit_copies();
  load_queries<Rows72>(shape, work, q_abs, q, 0, [&](int at, const uint4& unit) {
    *reinterpret_cast<uint4*>(queries + at) = unit;
  });

  float sums[4][8][4];
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
    }
  }
  constexpr float kLog2E = 1.44269504f;
  const float scale = shape.softmax_scale * kLog2E * (kFp8 ? kv.scale : 1.0f);
  float largest[2] = {-INFINITY, -INFINITY};  // rows lane / 4 and + 8 of the warp's 16 heads
  float total[2] = {};
  for (int t = work.begin; t < work.end; ++t) {
    wait_copies<0>();
    __syncthreads();  // the tile is there, and the other stage is free
    std::byte* tile = kFp8 ? tiles : raw_stage(t);
    if constexpr (kFp8) {
      convert_tile(raw_stage(t), tile);
      __syncthreads();
    }
    if (t + 1 < work.end)
      load_tile<kFp8>(kv, place.first_block, t + 1, work.visible, raw_stage(t + 1));
    commit_copies();
    if ((t + 1) * kTokens > work.visible) {
      clear_tail<Rows72>(tile, t * kTokens, work.visible);
      __syncthreads();
    }

    float scores[4][4];
    score_tile(queries, tile, exchange, scores);
    float best[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = t * kTokens + b * 32 + n * 8 + lane % 4 * 2 + i % 2;
        scores[n][i] = token < work.visible ? scores[n][i] * scale : -INFINITY;
        best[i / 2] = fmaxf(best[i / 2], scores[n][i]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      best[r] = fmaxf(best[r], __shfl_xor_sync(0xffffffffu, best[r], 1));
      best[r] = fmaxf(best[r], __shfl_xor_sync(0xffffffffu, best[r], 2));
      if (lane % 4 == 0) tile_largest[b][a * 16 + r * 8 + lane / 4] = best[r];
    }
    __syncthreads();  // the tile's keys are used, its maxima known
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int head = a * 16 + r * 8 + lane / 4;
      const float now = fmaxf(largest[r], fmaxf(tile_largest[0][head], tile_largest[1][head]));
      const float change = exp2f(largest[r] - now);  // a tile has a visible token: now is finite
      largest[r] = now;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float p0 = exp2f(scores[n][2 * r] - now);
        const float p1 = exp2f(scores[n][2 * r + 1] - now);
        sum += p0 + p1;
        const int unit = kLatent / 8 + b * 4 + n;
        *reinterpret_cast<unsigned*>(tile + Rows72::offset(head, unit) + lane % 4 * 4) =
            pack_bf16(p0, p1);
      }
      total[r] = total[r] * change + sum;
      if (b == 0 && lane % 4 == 0) correction[head] = change;
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const float low = correction[m * 16 + lane / 4];
      const float high = correction[m * 16 + lane / 4 + 8];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        sums[m][n][0] *= low;
        sums[m][n][1] *= low;
        sums[m][n][2] *= high;
        sums[m][n][3] *= high;
      }
    }
    add_values(tile, warp, sums);
  }

  const std::int64_t first = Partial::first(shape, work, splits);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
    total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
    if (lane % 4 == 0) totals[b][a * 16 + r * 8 + lane / 4] = total[r];
  }
  __syncthreads();
  if (b == 0 && lane % 4 == 0) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int h = a * 16 + r * 8 + lane / 4;
      partial.largest[first + h] = largest[r];
      partial.total[first + h] = totals[0][h] + totals[1][h];
    }
  }
  const float unscale = kFp8 ? kv.scale : 1.0f;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const int h = m * 16 + lane / 4;
    const float low = average_of(totals[0][h] + totals[1][h], unscale);
    const float high = average_of(totals[0][h + 8] + totals[1][h + 8], unscale);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      partial.store(first, m, warp * 8 + n, lane, sums[m][n], low, high);
    }
  }
}

// One block a (head and the one 8 below it, half of the columns, row). Four groups of threads add
// up every fourth split each, then the groups.
constexpr int kGroup = kLatent / 4;  // threads, of two columns of both heads each
constexpr int kGroups = 4;

__global__ void __launch_bounds__(kGroup* kGroups)
    combine_kernel(MlaShape shape, int splits, Partial partial, Matrix out) {
  __shared__ float weights[2][kMostSplits];
  __shared__ float totals[2][kMostSplits];
  __shared__ float4 parts[kGroups - 1][kGroup];
  begin_kernel();
  const int thread = static_cast<int>(threadIdx.x);
  const int group = thread / kGroup;
  const int pair = static_cast<int>(blockIdx.x) / 2;
  const int half = static_cast<int>(blockIdx.x) % 2;
  const int head = pair / 8 * 16 + pair % 8;
  if (head >= shape.heads) return;
  const std::int64_t row = blockIdx.y;
  const std::int64_t padded = padded_heads(shape);
  const std::int64_t first = row * splits * padded;
  const int lane = pair % 8 * 4 + thread % 4;
  const int eight = half * (kLatent / 16) + thread % kGroup / 4;
  const auto load = [&](int s) {
    return *partial.values(first + s * padded, pair / 8, eight, lane);
  };
  for (int i = thread; i < 2 * splits; i += kGroup * kGroups) {
    const std::int64_t at = first + i / 2 * padded + head + i % 2 * 8;
    weights[i % 2][i / 2] = partial.largest[at];
    totals[i % 2][i / 2] = partial.total[at];
  }
  __syncthreads();
  float largest[2] = {-INFINITY, -INFINITY};
  for (int s = 0; s < splits; ++s) {
    largest[0] = fmaxf(largest[0], weights[0][s]);
    largest[1] = fmaxf(largest[1], weights[1][s]);
  }
  const auto weight = [&](int h, int s) {  // 0 for an empty split
    return exp2f(weights[h][s] - largest[h]) * totals[h][s];
  };
  float4 sum{};
#pragma unroll 8
  for (int s = group; s < splits; s += kGroups) {
    const uint2 part = load(s);
    const float2 first_two = __half22float2(*reinterpret_cast<const __half2*>(&part.x));
    const float2 second_two = __half22float2(*reinterpret_cast<const __half2*>(&part.y));
    const float low = weight(0, s);
    const float high = weight(1, s);
    sum.x = fmaf(low, first_two.x, sum.x);
    sum.y = fmaf(low, first_two.y, sum.y);
    sum.z = fmaf(high, second_two.x, sum.z);
    sum.w = fmaf(high, second_two.y, sum.w);
  }
  if (group > 0) parts[group - 1][thread % kGroup] = sum;
  __syncthreads();
  if (group > 0) return;
  float total[2] = {};
  for (int s = 0; s < splits; ++s) {
    total[0] += weight(0, s);
    total[1] += weight(1, s);
  }
#pragma unroll
  for (int g = 0; g < kGroups - 1; ++g) {
    const float4 part = parts[g][thread];
    sum.x += part.x;
    sum.y += part.y;
    sum.z += part.z;
    sum.w += part.w;
  }
  float* to = out.data + row * out.stride + std::int64_t{head} * kLatent + eight * 8 + lane % 4 * 2;
  const float low = 1.0f / total[0];
  to[0] = sum.x * low;
  to[1] = sum.y * low;
  if (head + 8 >= shape.heads) return;
  const float high = 1.0f / total[1];
  to[8 * kLatent] = sum.z * high;
  to[8 * kLatent + 1] = sum.w * high;
}

struct Splits {
  int count;
  bool short_cache;  // two tiles each at most
};

// As many as keep every multiprocessor busy once. Where a cache is so short that reading queries
// and writing sums takes longer than the products do, fewer.
Splits splits_for(Device* device, const MlaShape& shape, std::int64_t rows,
                  std::int64_t max_length) {
  const std::int64_t tiles = tiles_of(max_length);
  const std::int64_t most =
      latent_splits(shape, rows, max_length,
                    std::min(std::int64_t{device->multiprocessors}, kMostMultiprocessors));
  constexpr std::int64_t kOfSharers = 2 * kQuerySharers;  // tiles
  if (device->wgmma && most == tiles && tiles >= kOfSharers) {
    return {static_cast<int>((tiles + kOfSharers - 1) / kOfSharers * kQuerySharers), true};
  }
  return {static_cast<int>(most), false};
}

}  // namespace

bool latent_fast_fit(Device* device, const MlaShape& shape, KvFormat format) {
  return shape.kv_lora_rank == kLatent && shape.qk_rope_head_dim == kWidth - kLatent &&
         format != KvFormat::kF32 && device->shared_bytes >= kSharedBytes + 2048;
}

bool latent_fast(Device* device, const MlaShape& shape, const KvRows& kv, ConstMatrix q_abs,
                 ConstMatrix q, Matrix out, std::byte* workspace) {
  const auto [splits, short_cache] = splits_for(device, shape, kv.count, kv.max_length);
  Carver carver(workspace);
  const LatentParts parts = LatentParts::carve(carver, shape, kv.count, splits);
  const Partial partial{reinterpret_cast<__half*>(parts.outputs), parts.largest, parts.total};
  const auto rows = static_cast<unsigned>(kv.count);
  if (device->wgmma) {
    if (!latent_hopper(device, shape, kv, q_abs, q, splits, short_cache, partial)) return false;
  } else {
    const auto kernel = kv.format == KvFormat::kFp8 ? decode_kernel<true> : decode_kernel<false>;
    DSFP4_TRY(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    DSFP4_TRY(
        launch(device, kernel,
               dim3(static_cast<unsigned>(splits), static_cast<unsigned>(head_groups(shape)), rows),
               kThreads, kSharedBytes, shape, kv, q_abs, q, splits, partial));
  }
  DSFP4_TRY(launch(device, combine_kernel, dim3(static_cast<unsigned>(padded_heads(shape)), rows),
                   kGroup * kGroups, 0, shape, splits, partial, out));
  return true;
}

}  // namespace dsfp4::ops::cuda
