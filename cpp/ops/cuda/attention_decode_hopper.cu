// Absorbed latent attention on Hopper: as attention_decode.cu, but with wgmma. The first warpgroup
// computes a tile's scores and probabilities; both then add half of the columns of P V each to
// their output, 64 heads x 256 columns in registers.
//
// Short caches: the splits of a cluster of blocks convert a part of the queries each, for all of
// them, and add up their outputs through each other's shared memory before these are written.
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

// Scores of 64 heads x 64 tokens: scores[4n + i] is of head 16 warp + 8 (i / 2) + lane / 4 and
// token 8n + 2 (lane % 4) + i % 2.
__device__ __forceinline__ void score_tile(const std::byte* queries, const std::byte* tile,
                                           float (&scores)[32]) {
  order_registers();
#pragma unroll
  for (int k = 0; k < kWidth / 16; ++k) {
    const int at = k / 4 * kSliceBytes + k % 4 * 32;
    multiply_rows(scores, tile_descriptor<128>(queries + at), tile_descriptor<128>(tile + at),
                  k > 0);
  }
  commit_products();
  wait_products<0>();
}
#endif

template <bool kFp8, int kTogether>
__global__ void __launch_bounds__(kThreads, 1)
    hopper_decode_kernel(MlaShape shape, KvRows kv, ConstMatrix q_abs, ConstMatrix q, int splits,
                         Partial partial) {
#if DSFP4_ON_HOPPER
  extern __shared__ uint4 shared_units[];
  auto* queries = reinterpret_cast<std::byte*>(
      (reinterpret_cast<std::uintptr_t>(shared_units) + kTileAlignment - 1) / kTileAlignment *
      kTileAlignment);
  std::byte* tiles = queries + kTileBytes;
  std::byte* chances = tiles + 2 * kTileBytes;  // P [64 heads, 64 tokens], a slice
  __shared__ float correction[kHeads];
  __shared__ float head_largest[kHeads];
  __shared__ float head_total[kHeads];
  const auto cluster = cooperative_groups::this_cluster();

  const int thread = static_cast<int>(threadIdx.x);
  const int group = thread / 128;
  const int lane = thread % 32;
  const int head = thread / 32 % 4 * 16 + lane / 4;  // and 8 more
  // Blocks of the next kernel that began early would crowd where the first of these end.
  wait_for_inputs();
  const RowPlace place = kv.rows[blockIdx.z];
  const Work work = work_of_block(place, splits);

  const auto raw_stage = [&](int tile) {
    return kFp8 ? tiles + kTileBytes + tile % 2 * kRawBytes : tiles + tile % 2 * kTileBytes;
  };
  if (work.begin < work.end) {
    load_tile<Slices, kFp8>(kv, place.first_block, work.begin, work.visible, raw_stage(work.begin));
  }
  commit_copies();
  if constexpr (kTogether == 1) {
    load_queries<Slices>(shape, work, q_abs, q, 0, [&](int at, const uint4& unit) {
      *reinterpret_cast<uint4*>(queries + at) = unit;
    });
  } else {
    cluster.sync();  // all of them have begun
    constexpr int kShare = kHeads / kTogether;
    const int first = static_cast<int>(cluster.block_rank()) * kShare;
    load_queries<Slices, kShare>(shape, work, q_abs, q, first, [&](int at, const uint4& unit) {
#pragma unroll
      for (int other = 0; other < kTogether; ++other) {
        *reinterpret_cast<uint4*>(cluster.map_shared_rank(queries, other) + at) = unit;
      }
    });
    cluster.sync();
  }

  float sums[128];
#pragma unroll
  for (float& sum : sums) sum = 0.0f;
  constexpr float kLog2E = 1.44269504f;
  const float scale = shape.softmax_scale * kLog2E * (kFp8 ? kv.scale : 1.0f);
  float largest[2] = {-INFINITY, -INFINITY};
  float total[2] = {};
  for (int t = work.begin; t < work.end; ++t) {
    wait_copies<0>();
    if constexpr (!kFp8) publish_to_products();
    __syncthreads();  // the tile is there, and the other stage is free
    std::byte* tile = kFp8 ? tiles : raw_stage(t);
    if constexpr (kFp8) {
      convert_tile<Slices>(raw_stage(t), tile);
      publish_to_products();
      __syncthreads();
    }
    if (t + 1 < work.end) {
      load_tile<Slices, kFp8>(kv, place.first_block, t + 1, work.visible, raw_stage(t + 1));
    }
    commit_copies();
    if ((t + 1) * kTokens > work.visible) {
      clear_tail<Slices>(tile, t * kTokens, work.visible);
      publish_to_products();
      __syncthreads();
    }

    if (group == 0) {
      float scores[32];
      score_tile(queries, tile, scores);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float best = -INFINITY;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& score = scores[4 * n + 2 * r + i];
            const int token = t * kTokens + n * 8 + lane % 4 * 2 + i;
            score = token < work.visible ? score * scale : -INFINITY;
            best = fmaxf(best, score);
          }
        }
        best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 1));
        best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 2));
        const float now = fmaxf(largest[r], best);  // a tile has a visible token: it is finite
        const float change = exp2f(largest[r] - now);
        largest[r] = now;
        float sum = 0.0f;
        const int row = head + 8 * r;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const float p0 = exp2f(scores[4 * n + 2 * r] - now);
          const float p1 = exp2f(scores[4 * n + 2 * r + 1] - now);
          sum += p0 + p1;
          *reinterpret_cast<unsigned*>(chances + Slices::offset(row, n) + lane % 4 * 4) =
              pack_bf16(p0, p1);
        }
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
    order_registers();
#pragma unroll
    for (int k = 0; k < kTokens / 16; ++k) {
      multiply_columns(
          sums, tile_descriptor<128>(chances + k * 32),
          columns_descriptor(tile + group * 4 * kSliceBytes + k * 16 * 128, kSliceBytes));
    }
    commit_products();
    wait_products<0>();
  }

  // Each head's largest score and its sum of probabilities.
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
    total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
    if (group == 0 && lane % 4 == 0) {
      head_largest[head + 8 * r] = largest[r];
      head_total[head + 8 * r] = total[r];
    }
  }
  const float unscale = kFp8 ? kv.scale : 1.0f;
  const int written = splits / kTogether;
  const std::int64_t base =
      (work.row * written + work.split / kTogether) * shape.heads + work.first_head;
  if constexpr (kTogether == 1) {
    __syncthreads();
    if (thread < kHeads && work.first_head + thread < shape.heads) {
      partial.largest[base + thread] = head_largest[thread];
      partial.total[base + thread] = head_total[thread];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (work.first_head + head + 8 * r >= shape.heads) continue;
      float* to = partial.sums + (base + head + 8 * r) * kLatent + group * 256 + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < 32; ++n) {
        *reinterpret_cast<float2*>(to + n * 8) = {sums[4 * n + 2 * r] * unscale,
                                                  sums[4 * n + 2 * r + 1] * unscale};
      }
    }
  } else {
    cluster.sync();  // the numbers of all heads are there, and nobody's tiles are read any more
    float* outputs = reinterpret_cast<float*>(queries);  // [64 heads, kStride]
    constexpr int kStride = kLatent + 8;  // so that the rows of a warp lie in different banks
    static_assert(kHeads * kStride * sizeof(float) <= 3 * kTileBytes);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = head + 8 * r;
      float most = -INFINITY;
#pragma unroll
      for (int other = 0; other < kTogether; ++other) {
        most = fmaxf(most, cluster.map_shared_rank(head_largest, other)[row]);
      }
      // The cluster's first split has a token if any has.
      const float weight = most == -INFINITY ? 0.0f : exp2f(head_largest[row] - most) * unscale;
      float* to = outputs + row * kStride + group * 256 + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < 32; ++n) {
        *reinterpret_cast<float2*>(to + n * 8) = {sums[4 * n + 2 * r] * weight,
                                                  sums[4 * n + 2 * r + 1] * weight};
      }
    }
    cluster.sync();
    constexpr int kShare = kLatent / kTogether;  // columns
    const int rank = static_cast<int>(cluster.block_rank());
    const float* of[kTogether];
#pragma unroll
    for (int other = 0; other < kTogether; ++other) {
      of[other] = cluster.map_shared_rank(outputs, other);
    }
    for (int i = thread; i < kHeads * kShare / 4; i += kThreads) {
      const int row = i / (kShare / 4);
      const int column = rank * kShare + i % (kShare / 4) * 4;
      if (work.first_head + row >= shape.heads) break;
      float4 sum{};
#pragma unroll
      for (int other = 0; other < kTogether; ++other) {
        const float4 part = *reinterpret_cast<const float4*>(of[other] + row * kStride + column);
        sum.x += part.x;
        sum.y += part.y;
        sum.z += part.z;
        sum.w += part.w;
      }
      *reinterpret_cast<float4*>(partial.sums + (base + row) * kLatent + column) = sum;
    }
    if (rank == 0 && thread < kHeads && work.first_head + thread < shape.heads) {
      float most = -INFINITY;
#pragma unroll
      for (int other = 0; other < kTogether; ++other) {
        most = fmaxf(most, cluster.map_shared_rank(head_largest, other)[thread]);
      }
      float all = 0.0f;
#pragma unroll
      for (int other = 0; other < kTogether; ++other) {
        const float theirs = cluster.map_shared_rank(head_largest, other)[thread];
        if (theirs != -INFINITY) {
          all += exp2f(theirs - most) * cluster.map_shared_rank(head_total, other)[thread];
        }
      }
      partial.largest[base + thread] = most;
      partial.total[base + thread] = all;
    }
    cluster.sync();  // nobody reads this block's memory any more
  }
#endif
}

}  // namespace

bool latent_hopper(Device* device, const MlaShape& shape, const KvRows& kv, ConstMatrix q_abs,
                   ConstMatrix q, int splits, int together, const Partial& partial) {
  const bool fp8 = kv.format == KvFormat::kFp8;
  const auto kernel = together == 1
                          ? (fp8 ? hopper_decode_kernel<true, 1> : hopper_decode_kernel<false, 1>)
                          : (fp8 ? hopper_decode_kernel<true, 4> : hopper_decode_kernel<false, 4>);
  constexpr int kBytes = kSharedBytes + kTileAlignment;
  DSFP4_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(head_groups(shape)),
                  static_cast<unsigned>(kv.count));
  DSFP4_TRY(launch_clusters(device, kernel, grid, kThreads, kBytes, together, shape, kv, q_abs, q,
                            splits, partial));
  return true;
}

}  // namespace dsfp4::ops::cuda
