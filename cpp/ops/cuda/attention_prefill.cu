// Causal attention of DeepSeek's geometry (keys 128 + 64, values 128) for a prompt. Keys and values
// of some heads at a time are expanded from the cached latents by the products of many tokens; then
// flash attention: a block has 64 rows of one head, a warp 16 of them, whose queries, scores and
// sums stay in registers; tiles of 64 keys and values pass through shared memory, two at a time.
#include "ops/cuda/attention_prefill.cuh"
#include "ops/cuda/kernels.h"
#include "ops/cuda/large.cuh"
#include "ops/cuda/prepared.cuh"
#include "ops/cuda/workspaces.h"

namespace dsfp4::ops::cuda {
namespace {

using namespace prefill;

constexpr int kRows = 64;
constexpr int kTokens = 64;
constexpr int kThreads = 128;
constexpr int kKeyUnits = kKey / 8;
constexpr int kValueUnits = kValue / 8;
constexpr int kKeyBytes = kTokens * kKey * 2;
constexpr int kValueBytes = kTokens * kValue * 2;
constexpr int kStageBytes = kKeyBytes + kValueBytes;
constexpr int kSharedBytes = 2 * kStageBytes;

__device__ __forceinline__ int key_offset(int row, int unit) {
  return (row * kKeyUnits + (unit ^ (row & 7))) * 16;
}
__device__ __forceinline__ int value_offset(int row, int unit) {
  return (row * kValueUnits + (unit ^ (row & 7))) * 16;
}

__device__ __forceinline__ void load_transposed(unsigned out[4], const void* from) {
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(from));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared));
}

__device__ __forceinline__ void load_tile(const Arguments& a, std::int64_t head, std::int64_t first,
                                          std::int64_t length, std::byte* stage) {
  const std::int64_t stride = a.heads * kExpanded;
  for (int i = static_cast<int>(threadIdx.x); i < kTokens * (kKeyUnits + kValueUnits);
       i += kThreads) {
    const int token = i / (kKeyUnits + kValueUnits);
    const int unit = i % (kKeyUnits + kValueUnits);
    const std::int64_t s = min(first + token, length - 1);  // masked if beyond
    const __nv_bfloat16* row = a.expanded + s * stride + head * kExpanded;
    if (unit < kNope / 8) {
      copy_async<16>(stage + key_offset(token, unit), row + unit * 8);
    } else if (unit < kKeyUnits) {
      copy_async<16>(stage + key_offset(token, unit), a.keys + s * kRope + (unit - kNope / 8) * 8);
    } else {
      copy_async<16>(stage + kKeyBytes + value_offset(token, unit - kKeyUnits),
                     row + kNope + (unit - kKeyUnits) * 8);
    }
  }
}

__global__ void __launch_bounds__(kThreads, 2) flash_kernel(const Arguments a) {
  extern __shared__ uint4 shared_units[];
  auto* shared = reinterpret_cast<std::byte*>(shared_units);
  const int tid = static_cast<int>(threadIdx.x);
  const int warp = tid / 32;
  const int lane = tid % 32;
  const std::int64_t head = blockIdx.y;  // of the group
  // The last rows see most keys: they begin first.
  const std::int64_t first_row = (gridDim.x - 1 - std::int64_t{blockIdx.x}) * kRows;
  const std::int64_t length = a.length();
  const std::int64_t rows = min(a.part.rows - first_row, std::int64_t{kRows});

  for (int i = tid; i < kRows * kKeyUnits; i += kThreads) {
    const int r = i / kKeyUnits;
    const int unit = i % kKeyUnits;
    *reinterpret_cast<uint4*>(shared + key_offset(r, unit)) =
        a.query_unit(first_row + r, head, unit);
  }
  __syncthreads();
  unsigned query[kKey / 16][4];
#pragma unroll
  for (int k = 0; k < kKey / 16; ++k) {
    load_matrices(query[k], shared + key_offset(warp * 16 + lane % 16, 2 * k + lane / 16));
  }
  __syncthreads();

  float sums[kValue / 8][4];
#pragma unroll
  for (int n = 0; n < kValue / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
  }
  float largest[2] = {-INFINITY, -INFINITY};
  float total[2] = {};
  const std::int64_t last = a.part.position + first_row + rows;  // tokens that the last row sees
  const int tiles = static_cast<int>((last + kTokens - 1) / kTokens);
  load_tile(a, head, 0, length, shared);
  commit_copies();
  for (int t = 0; t < tiles; ++t) {
    if (t + 1 < tiles) {
      load_tile(a, head, std::int64_t{t + 1} * kTokens, length, shared + (t + 1) % 2 * kStageBytes);
    }
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    const std::byte* keys = shared + t % 2 * kStageBytes;
    const std::byte* values = keys + kKeyBytes;

    float scores[kTokens / 8][4];
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kKey / 16; ++k) {
#pragma unroll
      for (int n = 0; n < kTokens / 8; n += 2) {
        unsigned right[4];
        load_matrices(right,
                      keys + key_offset(n * 8 + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
        multiply(scores[n], query[k], right[0], right[1]);
        multiply(scores[n + 1], query[k], right[2], right[3]);
      }
    }
    const std::int64_t first = std::int64_t{t} * kTokens;
    const std::int64_t seen =
        a.part.position + first_row + warp * 16 + lane / 4;  // by row lane / 4: itself included
    const bool masked = first + kTokens - 1 > a.part.position + first_row + warp * 16;
    float best[2] = {largest[0], largest[1]};
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::int64_t s = first + n * 8 + lane % 4 * 2 + i % 2;
        float score = scores[n][i] * a.scale;
        if (masked && s > seen + i / 2 * 8) score = -INFINITY;
        scores[n][i] = score;
        best[i / 2] = fmaxf(best[i / 2], score);
      }
    }
    float change[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      best[r] = fmaxf(best[r], __shfl_xor_sync(0xffffffffu, best[r], 1));
      best[r] = fmaxf(best[r], __shfl_xor_sync(0xffffffffu, best[r], 2));
      change[r] = exp2f(largest[r] - best[r]);  // every row sees the first tile
      largest[r] = best[r];
      total[r] *= change[r];
    }
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[n][i] = exp2f(scores[n][i] - largest[i / 2]);
        total[i / 2] += scores[n][i];
      }
    }
#pragma unroll
    for (int n = 0; n < kValue / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] *= change[i / 2];
    }
#pragma unroll
    for (int k = 0; k < kTokens / 16; ++k) {
      const unsigned p[4] = {pack_bf16(scores[2 * k][0], scores[2 * k][1]),
                             pack_bf16(scores[2 * k][2], scores[2 * k][3]),
                             pack_bf16(scores[2 * k + 1][0], scores[2 * k + 1][1]),
                             pack_bf16(scores[2 * k + 1][2], scores[2 * k + 1][3])};
#pragma unroll
      for (int n = 0; n < kValue / 8; n += 2) {
        unsigned v[4];
        load_transposed(v,
                        values + value_offset(k * 16 + lane / 8 % 2 * 8 + lane % 8, n + lane / 16));
        multiply(sums[n], p, v[0], v[1]);
        multiply(sums[n + 1], p, v[2], v[3]);
      }
    }
    __syncthreads();  // before the stage is loaded anew
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
    total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
    const std::int64_t row = warp * 16 + r * 8 + lane / 4;
    if (row >= rows) continue;
    const float inverse = 1.0f / total[r];
    float* to = a.output(first_row + row, head) + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kValue / 8; ++n) {
      to[n * 8] = sums[n][2 * r] * inverse;
      to[n * 8 + 1] = sums[n][2 * r + 1] * inverse;
    }
  }
}

// Rows [first, first + count) of a weight; `first` is a multiple of 128.
WeightView rows_of(const WeightView& weight, std::int64_t first, std::int64_t count) {
  WeightView rows = weight;
  rows.rows = count;
  const std::int64_t values = first * weight.cols;
  constexpr std::int64_t kTile = ::dsfp4::format::kFp8Tile;
  switch (weight.format) {
    case WeightFormat::kF32:
      rows.data += values * 4;
      break;
    case WeightFormat::kBF16:
      rows.data += values * 2;
      break;
    case WeightFormat::kFp8Block:
      rows.data += values;
      rows.scales += first / kTile * ((weight.cols + kTile - 1) / kTile) * 4;
      break;
    case WeightFormat::kNvfp4:
      rows.data += values / 2;
      rows.scales += values / ::dsfp4::format::kNvfp4Group;
      break;
    case WeightFormat::kMxfp4:
      rows.data += values / 2;
      rows.scales += values / ::dsfp4::format::kMxfp4Group;
      break;
  }
  return rows;
}

}  // namespace

bool prefill_fast_fit(const MlaShape& shape, const WeightView& kv_b_proj, KvFormat format) {
  return shape.qk_nope_head_dim == kNope && shape.qk_rope_head_dim == kRope &&
         shape.v_head_dim == kValue && shape.kv_lora_rank % 128 == 0 && format != KvFormat::kF32 &&
         linear_large_fit(kv_b_proj);
}

bool prefill_fast(Device* device, const MlaShape& shape, const WeightView& kv_b_proj,
                  const KvRows& kv, SequencePart part, ConstMatrix q, Matrix out,
                  std::byte* workspace) {
  const std::int64_t length = part.position + part.rows;
  Carver carver(workspace);
  const ExpandedHeads space = ExpandedHeads::carve(carver, shape, length);
  auto* const latents = reinterpret_cast<__nv_bfloat16*>(space.latents);
  auto* const keys = reinterpret_cast<__nv_bfloat16*>(space.keys);
  auto* const expanded = reinterpret_cast<__nv_bfloat16*>(space.expanded);
  if (!gather_latents(device, shape, kv_b_proj, kv, part.first_block, length, latents, keys)) {
    return false;
  }
  DSFP4_TRY(cudaFuncSetAttribute(flash_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 kSharedBytes));
  const std::int64_t together = ExpandedHeads::heads_at_once(shape, length);
  for (std::int64_t head = 0; head < shape.heads; head += together) {
    const std::int64_t heads = std::min(together, shape.heads - head);
    const WeightView weight = rows_of(kv_b_proj, head * kExpanded, heads * kExpanded);
    if (!linear_prepared(device, weight, latents, length, expanded)) return false;
    const Arguments arguments{
        shape.softmax_scale * 1.44269504f, part, head, heads, expanded, keys, q, out};
    if (device->wgmma) {
      if (!launch_hopper(device, arguments)) return false;
      continue;
    }
    flash_kernel<<<dim3(blocks_for(part.rows, kRows), static_cast<unsigned>(heads)), kThreads,
                   kSharedBytes, device->stream>>>(arguments);
    DSFP4_LAUNCHED("flash_kernel");
  }
  return true;
}

}  // namespace dsfp4::ops::cuda
