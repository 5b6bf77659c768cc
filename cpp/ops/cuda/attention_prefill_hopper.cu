// Attention of a prompt on Hopper: as attention_prefill.cu, but with wgmma. A block has 128 rows of
// one head, a warpgroup 64 of them; tiles of 128 keys and values pass through shared memory, asked
// for by a thread of its own. While a warpgroup takes exponentials of a tile's scores, the tensor
// cores add the values of the tile before, and work for the other (the order of FlashAttention-3,
// https://arxiv.org/abs/2407.08608).
#include "ops/cuda/attention_prefill.cuh"
#include "ops/cuda/hopper.cuh"
#include "ops/cuda/tensor_map.cuh"

namespace dsfp4::ops::cuda {
namespace {

using namespace prefill;

constexpr int kGroups = 2;
constexpr int kProducts = kGroups * 128;   // threads
constexpr int kThreads = kProducts + 128;  // registers are given to whole warpgroups
constexpr int kRows = kGroups * 64;
constexpr int kTokens = 128;
constexpr int kQuerySlice = kRows * 128;  // bytes; slices have 64 columns
constexpr int kSlice = kTokens * 128;
constexpr int kQueryBytes = kKey / 64 * kQuerySlice;
constexpr int kKeyBytes = kKey / 64 * kSlice;
constexpr int kValueBytes = kValue / 64 * kSlice;
constexpr int kTileBytes = kQueryBytes + 2 * (kKeyBytes + kValueBytes);
constexpr int kSharedBytes = kTileBytes + 8 * 8;

struct Maps {
  CUtensorMap expanded;
  CUtensorMap keys;
};

#if DSFP4_ON_HOPPER
// Two stages of tiles: `full` has a phase for every tile that came, `free` for every one used.
struct Ring {
  unsigned tiles;
  int bytes;
  unsigned full, free;  // [2]

  __device__ __forceinline__ unsigned tile(int t) const { return tiles + t % 2 * bytes; }
  __device__ __forceinline__ unsigned begin_copies(int t) const {
    barrier_wait(free + t % 2 * 8, t / 2 % 2 ^ 1);
    barrier_expect(full + t % 2 * 8, bytes);
    return full + t % 2 * 8;
  }
  __device__ __forceinline__ void wait(int t) const { barrier_wait(full + t % 2 * 8, t / 2 % 2); }
  __device__ __forceinline__ void release(int t) const {
    barrier_arrive_if(threadIdx.x % 32 == 0, free + t % 2 * 8);
  }
};
#endif

__global__ void __launch_bounds__(kThreads, 1)
    flash_hopper_kernel(const Arguments a, const __grid_constant__ Maps maps) {
#if DSFP4_ON_HOPPER
  extern __shared__ __align__(1024) std::byte shared[];
  const unsigned queries = shared_address(shared);
  const unsigned barriers = queries + kTileBytes;
  const Ring keys{queries + kQueryBytes, kKeyBytes, barriers, barriers + 16};
  const Ring values{keys.tiles + 2 * kKeyBytes, kValueBytes, barriers + 32, barriers + 48};

  const int tid = static_cast<int>(threadIdx.x);
  const std::int64_t head = blockIdx.y;  // of the group
  // The last rows see most keys: they begin first.
  const std::int64_t first_row = (gridDim.x - 1 - std::int64_t{blockIdx.x}) * kRows;
  // Tokens that the block's last row sees.
  const int last =
      static_cast<int>(a.part.position + min(a.part.rows, first_row + std::int64_t{kRows}));
  const int tiles = (last + kTokens - 1) / kTokens;

  if (tid == 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      barrier_begin(keys.full + i * 8, 1);
      barrier_begin(values.full + i * 8, 1);
      barrier_begin(keys.free + i * 8, kProducts / 32);
      barrier_begin(values.free + i * 8, kProducts / 32);
    }
  }
  for (int i = tid; i < kRows * (kKey / 8); i += kThreads) {
    const int r = i / (kKey / 8);
    const int unit = i % (kKey / 8);
    store_shared16(queries + unit / 8 * kQuerySlice + r * 128 + (unit % 8 ^ (r & 7)) * 16,
                   a.query_unit(first_row + r, head, unit));
  }
  publish_to_products();
  __syncthreads();

  if (tid >= kProducts) {
    give_registers<24>();
    if (tid > kProducts) return;
    const int col = static_cast<int>(head) * kExpanded;
    const auto load_values = [&](int t) {
      const unsigned full = values.begin_copies(t);
#pragma unroll
      for (int s = 0; s < kValue / 64; ++s) {
        copy_tile(values.tile(t) + s * kSlice, maps.expanded, t * kTokens, col + kNope + s * 64,
                  full);
      }
    };
    for (int t = 0; t < tiles; ++t) {
      const unsigned full = keys.begin_copies(t);
#pragma unroll
      for (int s = 0; s < kNope / 64; ++s) {
        copy_tile(keys.tile(t) + s * kSlice, maps.expanded, t * kTokens, col + s * 64, full);
      }
      copy_tile(keys.tile(t) + kNope / 64 * kSlice, maps.keys, t * kTokens, 0, full);
      if (t > 0) load_values(t - 1);
    }
    load_values(tiles - 1);
    return;
  }

  take_registers<240>();
  const int group = tid / 128;
  const int lane = tid % 32;
  // scores and sums: [4n + i] is of row 8 (i / 2) + lane / 4 of the warp and token, or column,
  // 8n + 2 (lane % 4) + i % 2.
  float scores[kTokens / 2];
  float sums[kValue / 2];
#pragma unroll
  for (float& sum : sums) sum = 0.0f;
  unsigned chances[kTokens / 16][4];
  float largest[2] = {-INFINITY, -INFINITY};
  float total[2] = {};

  const std::uint64_t own_queries = tile_descriptor<128>(queries + group * 64 * 128);
  const auto begin_scores = [&](int t) {
    const std::uint64_t tile = tile_descriptor<128>(keys.tile(t));
    order_registers();
#pragma unroll
    for (int k = 0; k < kKey / 16; ++k) {
      multiply_rows(scores, further(own_queries, k / 4 * kQuerySlice + k % 4 * 32),
                    further(tile, k / 4 * kSlice + k % 4 * 32), k > 0);
    }
    commit_products();
  };
  const auto begin_values = [&](int t) {
    const std::uint64_t tile = columns_descriptor(values.tile(t), kSlice);
    order_registers();
#pragma unroll
    for (int k = 0; k < kTokens / 16; ++k) {
      multiply_columns(sums, chances[k], further(tile, k * 16 * 128));
    }
    commit_products();
  };
  const std::int64_t warp_row = first_row + group * 64 + tid / 32 % 4 * 16;
  const int seen = static_cast<int>(a.part.position + warp_row);  // the last key of its first row
  // Scores of tile `t` to probabilities, and by how much what was summed before shrinks.
  float change[2];
  const auto soften = [&](int t) {
    if (t * kTokens + kTokens - 1 > seen) {
      const int left = seen + lane / 4 - t * kTokens - lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) {
        if (i / 4 * 8 + i % 2 > left + i % 4 / 2 * 8) scores[i] = -INFINITY;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float best = largest[r];
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) {
        best = fmaxf(best, fmaxf(scores[4 * n + 2 * r], scores[4 * n + 2 * r + 1]));
      }
      best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 1));
      best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 2));
      change[r] = exp2_fast((largest[r] - best) * a.scale);  // every row sees the first tile
      largest[r] = best;
      const float base = best * a.scale;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = scores[4 * n + 2 * r + i];
          score = exp2_fast(fmaf(score, a.scale, -base));
          sum += score;
        }
      }
      total[r] = total[r] * change[r] + sum;
    }
  };
  const auto pack_chances = [&] {
#pragma unroll
    for (int k = 0; k < kTokens / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        chances[k][i] = pack_bf16(scores[8 * k + 2 * i], scores[8 * k + 2 * i + 1]);
      }
    }
  };

  keys.wait(0);
  begin_scores(0);
  wait_products<0>();
  keys.release(0);
  soften(0);
  pack_chances();
  // No branch while products are under way: the compiler would wait for each of them.
  for (int t = 1; t < tiles; ++t) {
    keys.wait(t);
    values.wait(t - 1);
    begin_scores(t);
    begin_values(t - 1);
    wait_products<1>();
    keys.release(t);
    soften(t);
    wait_products<0>();
    values.release(t - 1);
#pragma unroll
    for (int i = 0; i < kValue / 2; ++i) sums[i] *= change[i % 4 / 2];
    pack_chances();
  }
  values.wait(tiles - 1);
  begin_values(tiles - 1);
  wait_products<0>();

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
    total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
    const std::int64_t row = warp_row + r * 8 + lane / 4;
    if (row >= a.part.rows) continue;
    const float inverse = 1.0f / total[r];
    float* to = a.output(row, head) + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kValue / 8; ++n) {
      to[n * 8] = sums[4 * n + 2 * r] * inverse;
      to[n * 8 + 1] = sums[4 * n + 2 * r + 1] * inverse;
    }
  }
#endif
}

}  // namespace

bool prefill::launch_hopper(Device* device, const Arguments& arguments) {
  Maps maps;
  const std::int64_t length = arguments.length();
  const std::int64_t cols = arguments.heads * kExpanded;
  if (!map_tiles(maps.expanded, arguments.expanded, length, cols, cols, kTokens) ||
      !map_tiles(maps.keys, arguments.keys, length, kRope, kRope, kTokens)) {
    return false;
  }
  DSFP4_TRY(cudaFuncSetAttribute(flash_hopper_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 kSharedBytes));
  flash_hopper_kernel<<<dim3(blocks_for(arguments.part.rows, kRows),
                             static_cast<unsigned>(arguments.heads)),
                        kThreads, kSharedBytes, device->stream>>>(arguments, maps);
  DSFP4_LAUNCHED("flash_hopper_kernel");
  return true;
}

}  // namespace dsfp4::ops::cuda
