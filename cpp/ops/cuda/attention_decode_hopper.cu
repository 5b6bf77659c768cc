// Absorbed latent attention on Hopper: as attention_decode.cu, but with wgmma. The first warpgroup
// computes a tile's scores and probabilities; both then add half of the columns of P V each to
// their output, 64 heads x 256 columns in registers.
#include "ops/cuda/attention_decode.cuh"
#include "ops/cuda/hopper.cuh"

namespace dsfp4::ops::cuda {
namespace {

constexpr int kTileAlignment = 1024;        // of a swizzle's pattern
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

template <bool kFp8>
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
  load_queries<Slices>(shape, work, q_abs, q, queries);

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

  const std::int64_t base = (work.row * splits + work.split) * shape.heads + work.first_head;
  const float unscale = kFp8 ? kv.scale : 1.0f;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = head + 8 * r;
    if (work.first_head + row >= shape.heads) continue;
    total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
    total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
    if (group == 0 && lane % 4 == 0) {
      partial.largest[base + row] = largest[r];
      partial.total[base + row] = total[r];
    }
    float* to = partial.sums + (base + row) * kLatent + group * 256 + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < 32; ++n) {
      *reinterpret_cast<float2*>(to + n * 8) = {sums[4 * n + 2 * r] * unscale,
                                                sums[4 * n + 2 * r + 1] * unscale};
    }
  }
#endif
}

}  // namespace

bool latent_hopper(Device* device, const MlaShape& shape, const KvRows& kv, ConstMatrix q_abs,
                   ConstMatrix q, int splits, const Partial& partial) {
  const auto kernel =
      kv.format == KvFormat::kFp8 ? hopper_decode_kernel<true> : hopper_decode_kernel<false>;
  constexpr int kBytes = kSharedBytes + kTileAlignment;
  DSFP4_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  DSFP4_TRY(launch(device, kernel,
                   dim3(static_cast<unsigned>(splits), static_cast<unsigned>(head_groups(shape)),
                        static_cast<unsigned>(kv.count)),
                   kThreads, kBytes, shape, kv, q_abs, q, splits, partial));
  return true;
}

}  // namespace dsfp4::ops::cuda
