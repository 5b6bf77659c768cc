// Latent attention for any head size, in plain kernels: one block a (row, head). What they read of
// the cache comes from L2 for all but the first head.
#include "ops/cuda/common.cuh"
#include "ops/cuda/decode.cuh"
#include "ops/cuda/kernels.h"
#include "ops/cuda/workspaces.h"

namespace dsfp4::ops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ const std::byte* block_of(const KvRows& kv, std::int64_t first_block,
                                                     std::int64_t token) {
  return kv.blocks[first_block + token / kKvBlockTokens] + kv.layer_offset;
}

// Value i of cached token `token`, whose block this is.
__device__ __forceinline__ float cached_value(const KvRows& kv, const std::byte* block,
                                              std::int64_t token, std::int64_t width,
                                              std::int64_t i) {
  const std::int64_t at = token % kKvBlockTokens * width + i;
  if (kv.format == KvFormat::kBf16) {
    return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(block)[at]);
  }
  if (kv.format == KvFormat::kFp8) {
    return e4m3_value(reinterpret_cast<const unsigned char*>(block)[at]) * kv.scale;
  }
  return reinterpret_cast<const float*>(block)[at];
}

__device__ float block_sum(float value, float* parts) {
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
  for (int w = 0; w < kWarps; ++w) sum += parts[w];
  return sum;
}

__device__ float block_max(float value, float* parts) {
  value = warp_max(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  float largest = parts[0];
  for (int w = 1; w < kWarps; ++w) largest = fmaxf(largest, parts[w]);
  return largest;
}

// Online softmax over pieces of kPiece tokens, so that shared memory does not grow with the
// context. `score(s)` is a token's score, computed by a whole warp; `value(s, i)` a value of it.
constexpr int kPiece = 256;
constexpr int kMostValues = 4;  // outputs a thread: width <= kThreads * kMostValues

template <typename Score, typename Value>
__device__ void attend(std::int64_t visible, std::int64_t width, const Score& score,
                       const Value& value, float* out) {
  __shared__ float p[kPiece];
  __shared__ float parts[kWarps];
  float sums[kMostValues] = {};
  float largest = -INFINITY;
  float total = 0.0f;
  for (std::int64_t begin = 0; begin < visible; begin += kPiece) {
    const int count = static_cast<int>(min(visible - begin, std::int64_t{kPiece}));
    for (int s = static_cast<int>(threadIdx.x) / 32; s < count; s += kWarps) {
      const float result = score(begin + s);
      if (threadIdx.x % 32 == 0) p[s] = result;
    }
    __syncthreads();
    const int mine = static_cast<int>(threadIdx.x);
    const float before = largest;
    largest = fmaxf(largest, block_max(mine < count ? p[mine] : -INFINITY, parts));
    const float weight = mine < count ? __expf(p[mine] - largest) : 0.0f;
    const float correction = __expf(before - largest);
    total = total * correction + block_sum(weight, parts);
    p[mine] = weight;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kMostValues; ++j) {
      const std::int64_t i = threadIdx.x + std::int64_t{j} * kThreads;
      if (i >= width) continue;
      float sum = sums[j] * correction;
      for (int s = 0; s < count; ++s) sum = fmaf(p[s], value(begin + s, i), sum);
      sums[j] = sum;
    }
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < kMostValues; ++j) {
    const std::int64_t i = threadIdx.x + std::int64_t{j} * kThreads;
    if (i < width) out[i] = sums[j] / total;
  }
}

__global__ void __launch_bounds__(kThreads)
    latent_kernel(MlaShape shape, KvRows kv, ConstMatrix q_abs, ConstMatrix q, Matrix out) {
  extern __shared__ float query[];
  const std::int64_t row = blockIdx.y;
  const std::int64_t head = blockIdx.x;
  const std::int64_t lora = shape.kv_lora_rank;
  const std::int64_t width = shape.cache_width();
  const RowPlace place = kv.rows[row];
  for (std::int64_t i = threadIdx.x; i < width; i += kThreads) {
    query[i] = i < lora ? q_abs.data[row * q_abs.stride + head * lora + i]
                        : q.data[row * q.stride + head * shape.qk_head_dim() +
                                 shape.qk_nope_head_dim + i - lora];
  }
  __syncthreads();
  const auto score = [&](std::int64_t s) {
    const std::byte* block = block_of(kv, place.first_block, s);
    float sum = 0.0f;
    for (std::int64_t i = threadIdx.x % 32; i < width; i += 32) {
      sum = fmaf(query[i], cached_value(kv, block, s, width, i), sum);
    }
    return warp_sum(sum) * shape.softmax_scale;
  };
  const auto value = [&](std::int64_t s, std::int64_t i) {
    return cached_value(kv, block_of(kv, place.first_block, s), s, width, i);
  };
  attend(place.position + 1, lora, score, value, out.data + row * out.stride + head * lora);
}

// Keys and values of one head from cached latents, BF16: [length, nope + rope + v].
__global__ void expand_kernel(MlaShape shape, WeightView kv_b_proj, KvRows kv, SequencePart part,
                              std::int64_t first_head, float* expanded) {
  const std::int64_t s = blockIdx.x;
  const std::int64_t head = first_head + blockIdx.y;
  const std::int64_t length = part.position + part.rows;
  const std::int64_t nope = shape.qk_nope_head_dim;
  const std::int64_t rope = shape.qk_rope_head_dim;
  const std::int64_t stride = nope + rope + shape.v_head_dim;
  const std::int64_t width = shape.cache_width();
  const std::byte* block = block_of(kv, part.first_block, s);
  float* to = expanded + (blockIdx.y * length + s) * stride;
  extern __shared__ float latent[];
  for (std::int64_t i = threadIdx.x; i < width; i += kThreads) {
    latent[i] = cached_value(kv, block, s, width, i);
  }
  __syncthreads();
  for (std::int64_t i = threadIdx.x; i < rope; i += kThreads) {
    to[nope + i] = latent[shape.kv_lora_rank + i];
  }
  const float scale = epilogue_scale(kv_b_proj);
  for (std::int64_t i = threadIdx.x / 32; i < nope + shape.v_head_dim; i += kWarps) {
    const std::int64_t row = head * (nope + shape.v_head_dim) + i;
    float sum = 0.0f;
    for (std::int64_t c = threadIdx.x % 32; c < shape.kv_lora_rank; c += 32) {
      sum = fmaf(weight_value(kv_b_proj, row, c), latent[c], sum);
    }
    sum = warp_sum(sum) * scale;
    if (threadIdx.x % 32 == 0) to[i < nope ? i : i + rope] = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    prefill_kernel(MlaShape shape, SequencePart part, std::int64_t first_head,
                   const float* expanded, ConstMatrix q, Matrix out) {
  const std::int64_t row = part.first_row + blockIdx.x;
  const std::int64_t head = first_head + blockIdx.y;
  const std::int64_t length = part.position + part.rows;
  const std::int64_t dim = shape.qk_head_dim();
  const std::int64_t stride = dim + shape.v_head_dim;
  const float* kv = expanded + blockIdx.y * length * stride;
  const float* query = q.data + row * q.stride + head * dim;
  const auto score = [&](std::int64_t s) {
    float sum = 0.0f;
    for (std::int64_t i = threadIdx.x % 32; i < dim; i += 32) {
      sum = fmaf(query[i], kv[s * stride + i], sum);
    }
    return warp_sum(sum) * shape.softmax_scale;
  };
  const auto value = [&](std::int64_t s, std::int64_t i) { return kv[s * stride + dim + i]; };
  attend(part.position + blockIdx.x + 1, shape.v_head_dim, score, value,
         out.data + row * out.stride + head * shape.v_head_dim);
}

// q_abs[t, h, c] = sum over i of q_nope[t, h, i] W[h, i, c]: one block a head and 256 columns.
__global__ void absorb_kernel(MlaShape shape, WeightView kv_b_proj, ConstMatrix q, Matrix q_abs) {
  const std::int64_t c = blockIdx.x * std::int64_t{kThreads} + threadIdx.x;
  const std::int64_t head = blockIdx.y;
  if (c >= shape.kv_lora_rank) return;
  const std::int64_t row = head * (shape.qk_nope_head_dim + shape.v_head_dim);
  const float scale = epilogue_scale(kv_b_proj);
  constexpr int kTokens = 4;
  for (std::int64_t first = 0; first < q.rows; first += kTokens) {
    float sums[kTokens] = {};
    for (std::int64_t i = 0; i < shape.qk_nope_head_dim; ++i) {
      const float w = weight_value(kv_b_proj, row + i, c);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (first + t < q.rows) {
          sums[t] =
              fmaf(round_bf16(q.data[(first + t) * q.stride + head * shape.qk_head_dim() + i]), w,
                   sums[t]);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (first + t < q.rows) {
        q_abs.data[(first + t) * q_abs.stride + head * shape.kv_lora_rank + c] = sums[t] * scale;
      }
    }
  }
}

// out[t, h, i] = W_UV[h, i] . attended[t, h]: one warp a (head, i).
__global__ void expand_value_kernel(MlaShape shape, WeightView kv_b_proj, ConstMatrix attended,
                                    Matrix out) {
  const std::int64_t at = blockIdx.x * std::int64_t{kWarps} + threadIdx.x / 32;
  if (at >= shape.heads * shape.v_head_dim) return;
  const std::int64_t head = at / shape.v_head_dim;
  const std::int64_t row = head * (shape.qk_nope_head_dim + shape.v_head_dim) +
                           shape.qk_nope_head_dim + at % shape.v_head_dim;
  const std::int64_t lora = shape.kv_lora_rank;
  const float scale = epilogue_scale(kv_b_proj);
  for (std::int64_t t = 0; t < attended.rows; ++t) {
    const float* from = attended.data + t * attended.stride + head * lora;
    float sum = 0.0f;
    for (std::int64_t c = threadIdx.x % 32; c < lora; c += 32) {
      sum = fmaf(weight_value(kv_b_proj, row, c), round_bf16(from[c]), sum);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) out.data[t * out.stride + at] = sum * scale;
  }
}

std::int64_t heads_at_once(const MlaShape& shape, std::int64_t length) {
  return std::clamp<std::int64_t>(kPlainExpandedValues / plain_head_values(shape, length), 1,
                                  shape.heads);
}

bool check_width(Device* device, std::int64_t width, std::int64_t shared_floats) {
  if (width <= std::int64_t{kThreads} * kMostValues &&
      shared_floats * 4 <= device->shared_bytes - 4096) {
    return true;
  }
  return fail(cudaErrorInvalidValue, "attention: heads wider than 1024 values", __FILE__, __LINE__);
}

}  // namespace

bool prefill_plain(Device* device, const MlaShape& shape, const WeightView& kv_b_proj,
                   const KvRows& kv, SequencePart part, ConstMatrix q, Matrix out,
                   std::byte* workspace) {
  const std::int64_t length = part.position + part.rows;
  if (!check_width(device, shape.v_head_dim, shape.cache_width())) return false;
  const std::int64_t together = heads_at_once(shape, length);
  auto* expanded = reinterpret_cast<float*>(workspace);
  const auto shared = static_cast<std::size_t>(shape.cache_width()) * sizeof(float);
  for (std::int64_t head = 0; head < shape.heads; head += together) {
    const auto heads = static_cast<unsigned>(std::min(together, shape.heads - head));
    expand_kernel<<<dim3(static_cast<unsigned>(length), heads), kThreads, shared, device->stream>>>(
        shape, kv_b_proj, kv, part, head, expanded);
    DSFP4_LAUNCHED("expand_kernel");
    prefill_kernel<<<dim3(static_cast<unsigned>(part.rows), heads), kThreads, 0, device->stream>>>(
        shape, part, head, expanded, q, out);
    DSFP4_LAUNCHED("prefill_kernel");
  }
  return true;
}

bool latent_plain(Device* device, const MlaShape& shape, const KvRows& kv, ConstMatrix q_abs,
                  ConstMatrix q, Matrix out) {
  if (!check_width(device, shape.kv_lora_rank, shape.cache_width())) return false;
  const auto shared = static_cast<std::size_t>(shape.cache_width()) * sizeof(float);
  latent_kernel<<<dim3(static_cast<unsigned>(shape.heads), static_cast<unsigned>(kv.count)),
                  kThreads, shared, device->stream>>>(shape, kv, q_abs, q, out);
  DSFP4_LAUNCHED("latent_kernel");
  return true;
}

bool absorb_plain(Device* device, const MlaShape& shape, const WeightView& kv_b_proj, ConstMatrix q,
                  Matrix q_abs) {
  const dim3 grid(blocks_for(shape.kv_lora_rank, kThreads), static_cast<unsigned>(shape.heads));
  absorb_kernel<<<grid, kThreads, 0, device->stream>>>(shape, kv_b_proj, q, q_abs);
  DSFP4_LAUNCHED("absorb_kernel");
  return true;
}

bool expand_value_plain(Device* device, const MlaShape& shape, const WeightView& kv_b_proj,
                        ConstMatrix attended, Matrix out) {
  expand_value_kernel<<<blocks_for(shape.heads * shape.v_head_dim, kWarps), kThreads, 0,
                        device->stream>>>(shape, kv_b_proj, attended, out);
  DSFP4_LAUNCHED("expand_value_kernel");
  return true;
}

}  // namespace dsfp4::ops::cuda
