// Ops that only move or scale values. Each reads its inputs once and writes its output once; rows
// are tokens, FP32.
#include "ops/cuda/common.cuh"
#include "ops/cuda/decode.cuh"
#include "ops/cuda/kernels.h"

namespace dsfp4::ops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kNormThreads = 1024;  // one block has a whole row: its loads must overlap

template <WeightFormat kFormat>
__global__ void embed_kernel(WeightView table, const std::int32_t* ids, Matrix out) {
  const std::int64_t id = ids[blockIdx.x];
  float* to = out.data + blockIdx.x * out.stride;
  for (std::int64_t i = threadIdx.x; i < out.cols; i += kThreads) {
    to[i] = weight_value<kFormat>(table, id, i);
  }
}

// The sum of each thread's value, in an order that depends on nothing; all threads get it.
template <int kCount>
__device__ float block_sum(float value) {
  __shared__ float parts[kCount / 32];
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  return warp_sum(threadIdx.x % 32 < kCount / 32 ? parts[threadIdx.x % 32] : 0.0f);
}

// One block a row, which it keeps in registers: kFours * 4 * kNormThreads values at most.
template <int kFours>
__global__ void __launch_bounds__(kNormThreads)
    rms_norm_fours_kernel(ConstMatrix x, const float* weight, float eps, Matrix y) {
  const int fours = static_cast<int>(x.cols / 4);
  const auto* from = reinterpret_cast<const float4*>(x.data + blockIdx.x * x.stride);
  auto* to = reinterpret_cast<float4*>(y.data + blockIdx.x * y.stride);
  float4 weights[kFours];
#pragma unroll
  for (int j = 0; j < kFours; ++j) {  // no kernel writes them
    const int i = static_cast<int>(threadIdx.x) + j * kNormThreads;
    if (i < fours) weights[j] = reinterpret_cast<const float4*>(weight)[i];
  }
  begin_kernel();
  float4 values[kFours];
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kFours; ++j) {
    const int i = static_cast<int>(threadIdx.x) + j * kNormThreads;
    values[j] = i < fours ? from[i] : float4{};
    const float4& v = values[j];
    sum += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
  }
  const float scale = rsqrtf(block_sum<kNormThreads>(sum) / static_cast<float>(x.cols) + eps);
#pragma unroll
  for (int j = 0; j < kFours; ++j) {
    const int i = static_cast<int>(threadIdx.x) + j * kNormThreads;
    const float4& v = values[j];
    const float4& w = weights[j];
    if (i < fours) {
      to[i] = {v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w};
    }
  }
}

// The same for rows that are longer, or not aligned to 16 bytes.
__global__ void __launch_bounds__(kNormThreads)
    rms_norm_kernel(ConstMatrix x, const float* weight, float eps, Matrix y) {
  begin_kernel();
  const float* from = x.data + blockIdx.x * x.stride;
  float* to = y.data + blockIdx.x * y.stride;
  float sum = 0.0f;
  for (std::int64_t i = threadIdx.x; i < x.cols; i += kNormThreads) sum += from[i] * from[i];
  const float scale = rsqrtf(block_sum<kNormThreads>(sum) / static_cast<float>(x.cols) + eps);
  for (std::int64_t i = threadIdx.x; i < x.cols; i += kNormThreads)
    to[i] = from[i] * scale * weight[i];
}

__global__ void silu_mul_kernel(Matrix gate, ConstMatrix up) {
  begin_kernel();
  const std::int64_t i = blockIdx.x * std::int64_t{kThreads} + threadIdx.x;
  if (i >= gate.cols) return;
  float* g = gate.data + blockIdx.y * gate.stride + i;
  *g = silu(*g) * up.data[blockIdx.y * up.stride + i];
}

__global__ void zero_kernel(Matrix y) {
  begin_kernel();
  const std::int64_t i = blockIdx.x * std::int64_t{kThreads} + threadIdx.x;
  if (i < y.cols) y.data[blockIdx.y * y.stride + i] = 0.0f;
}

__global__ void add_kernel(ConstMatrix x, Matrix y) {
  begin_kernel();
  const std::int64_t i = blockIdx.x * std::int64_t{kThreads} + threadIdx.x;
  if (i < y.cols) y.data[blockIdx.y * y.stride + i] += x.data[blockIdx.y * x.stride + i];
}

__global__ void rope_kernel(Matrix x, std::int64_t heads, std::int64_t head_stride,
                            ConstMatrix cos_sin) {
  begin_kernel();
  const std::int64_t pairs = cos_sin.cols / 2;
  const std::int64_t i = blockIdx.x * std::int64_t{kThreads} + threadIdx.x;
  if (i >= heads * pairs) return;
  const std::int64_t pair = i % pairs;
  float* v = x.data + blockIdx.y * x.stride + i / pairs * head_stride + 2 * pair;
  const float* angle = cos_sin.data + blockIdx.y * cos_sin.stride + 2 * pair;
  const float a = v[0];
  const float b = v[1];
  v[0] = a * angle[0] - b * angle[1];
  v[1] = b * angle[0] + a * angle[1];
}

__global__ void combine_kernel(ConstMatrix pairs, const float* weights, std::int64_t top_k,
                               Matrix y) {
  begin_kernel();
  const std::int64_t i = blockIdx.x * std::int64_t{kThreads} + threadIdx.x;
  if (i >= y.cols) return;
  const std::int64_t t = blockIdx.y;
  float sum = y.data[t * y.stride + i];
  for (std::int64_t k = 0; k < top_k; ++k) {
    sum += weights[t * top_k + k] * pairs.data[(t * top_k + k) * pairs.stride + i];
  }
  y.data[t * y.stride + i] = sum;
}

// E4M3, nearest even, saturating; NaN stays NaN.
__device__ unsigned char to_e4m3(float value) {
  const unsigned sign = (__float_as_uint(value) >> 24) & 0x80u;
  if (isnan(value)) return static_cast<unsigned char>(sign | 0x7fu);
  const float magnitude = fminf(fabsf(value), 448.0f);
  if (magnitude < 0x1p-6f) {  // steps of 2^-9
    return static_cast<unsigned char>(sign | static_cast<unsigned>(rintf(magnitude * 512.0f)));
  }
  const unsigned bits = __float_as_uint(magnitude);
  const unsigned kept = (bits + 0x7ffffu + ((bits >> 20) & 1u)) >> 20;
  return static_cast<unsigned char>(sign | (kept - ((127u - 7u) << 3)));
}

__device__ void store(const KvRows& kv, std::byte* block, std::int64_t at, float value) {
  std::byte* layer = block + kv.layer_offset;
  if (kv.format == KvFormat::kBf16) {
    reinterpret_cast<__nv_bfloat16*>(layer)[at] = __float2bfloat16_rn(value);
  } else if (kv.format == KvFormat::kFp8) {
    reinterpret_cast<unsigned char*>(layer)[at] = to_e4m3(value / kv.scale);
  } else {
    reinterpret_cast<float*>(layer)[at] = value;
  }
}

__global__ void kv_append_kernel(KvRows kv, ConstMatrix x) {
  begin_kernel();
  const RowPlace place = kv.rows[blockIdx.x];
  std::byte* block = kv.blocks[place.first_block + place.position / kKvBlockTokens];
  const std::int64_t at = place.position % kKvBlockTokens * x.cols;
  const float* from = x.data + blockIdx.x * x.stride;
  for (std::int64_t i = threadIdx.x; i < x.cols; i += kThreads) store(kv, block, at + i, from[i]);
}

// (row, part): part 0 stores the row [latent | key] in the cache, the others rotate 256 pairs of q.
__global__ void __launch_bounds__(kThreads)
    mla_inputs_kernel(MlaShape shape, KvRows kv, ConstMatrix cos_sin, const float* kv_norm,
                      float eps, Matrix q, ConstMatrix x) {
  begin_kernel();
  const int row = static_cast<int>(blockIdx.y);
  const int pairs = static_cast<int>(shape.qk_rope_head_dim / 2);
  const float* angles = cos_sin.data + row * cos_sin.stride;
  const auto rotated = [&](const float* v, int pair) {
    const float c = angles[2 * pair];
    const float s = angles[2 * pair + 1];
    return float2{v[0] * c - v[1] * s, v[1] * c + v[0] * s};
  };
  if (blockIdx.x > 0) {
    const int i = static_cast<int>(blockIdx.x - 1) * kThreads + static_cast<int>(threadIdx.x);
    if (i >= static_cast<int>(shape.heads) * pairs) return;
    float* v = q.data + row * q.stride + i / pairs * shape.qk_head_dim() + shape.qk_nope_head_dim +
               2 * (i % pairs);
    const float2 turned = rotated(v, i % pairs);
    v[0] = turned.x;
    v[1] = turned.y;
    return;
  }
  const int rank = static_cast<int>(shape.kv_lora_rank);
  const RowPlace place = kv.rows[row];
  std::byte* block = kv.blocks[place.first_block + place.position / kKvBlockTokens];
  const std::int64_t at = place.position % kKvBlockTokens * x.cols;
  const float* from = x.data + row * x.stride;
  float sum = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < rank; i += kThreads) sum += from[i] * from[i];
  const float scale = rsqrtf(block_sum<kThreads>(sum) / static_cast<float>(rank) + eps);
  for (int i = static_cast<int>(threadIdx.x); i < rank; i += kThreads) {
    store(kv, block, at + i, from[i] * scale * kv_norm[i]);
  }
  for (int i = static_cast<int>(threadIdx.x); i < pairs; i += kThreads) {
    const float2 turned = rotated(from + rank + 2 * i, i);
    store(kv, block, at + rank + 2 * i, turned.x);
    store(kv, block, at + rank + 2 * i + 1, turned.y);
  }
}

dim3 grid_of(std::int64_t cols, std::int64_t rows) {
  return {blocks_for(cols, kThreads), static_cast<unsigned>(rows), 1};
}

bool empty(ConstMatrix x) { return x.rows == 0 || x.cols == 0; }

}  // namespace

bool embed(Device* device, const WeightView* table, const std::int32_t* ids, Matrix out) {
  if (empty(out)) return true;
  const auto rows = static_cast<unsigned>(out.rows);
  switch (table->format) {
    case WeightFormat::kF32:
      embed_kernel<WeightFormat::kF32><<<rows, kThreads, 0, device->stream>>>(*table, ids, out);
      break;
    case WeightFormat::kBF16:
      embed_kernel<WeightFormat::kBF16><<<rows, kThreads, 0, device->stream>>>(*table, ids, out);
      break;
    case WeightFormat::kFp8Block:
      embed_kernel<WeightFormat::kFp8Block>
          <<<rows, kThreads, 0, device->stream>>>(*table, ids, out);
      break;
    case WeightFormat::kNvfp4:
    case WeightFormat::kMxfp4:
      return fail(cudaErrorInvalidValue, "embed of an FP4 table", __FILE__, __LINE__);
  }
  DSFP4_LAUNCHED("embed_kernel");
  return true;
}

bool rms_norm(Device* device, ConstMatrix x, const float* weight, float eps, Matrix y) {
  if (empty(x)) return true;
  const auto in_fours = [](ConstMatrix m) {
    return reinterpret_cast<std::uintptr_t>(m.data) % 16 == 0 && m.stride % 4 == 0;
  };
  const std::int64_t most = 4 * kNormThreads;  // of a thread's first four
  const bool fours = in_fours(x) && in_fours(y) && in_fours({weight, 1, x.cols, 0}) &&
                     x.cols % 4 == 0 && x.cols <= 2 * most;
  const auto kernel = !fours           ? rms_norm_kernel
                      : x.cols <= most ? rms_norm_fours_kernel<1>
                                       : rms_norm_fours_kernel<2>;
  DSFP4_TRY(
      launch(device, kernel, static_cast<unsigned>(x.rows), kNormThreads, 0, x, weight, eps, y));
  return true;
}

bool silu_mul(Device* device, Matrix gate, ConstMatrix up) {
  if (empty(gate)) return true;
  DSFP4_TRY(launch(device, silu_mul_kernel, grid_of(gate.cols, gate.rows), kThreads, 0, gate, up));
  return true;
}

bool zero(Device* device, Matrix y) {
  if (empty(y)) return true;
  DSFP4_TRY(launch(device, zero_kernel, grid_of(y.cols, y.rows), kThreads, 0, y));
  return true;
}

bool add(Device* device, ConstMatrix x, Matrix y) {
  if (empty(y)) return true;
  DSFP4_TRY(launch(device, add_kernel, grid_of(y.cols, y.rows), kThreads, 0, x, y));
  return true;
}

bool rope(Device* device, Matrix x, std::int64_t heads, std::int64_t head_stride,
          ConstMatrix cos_sin) {
  if (x.rows == 0 || cos_sin.cols == 0) return true;
  DSFP4_TRY(launch(device, rope_kernel, grid_of(heads * cos_sin.cols / 2, x.rows), kThreads, 0, x,
                   heads, head_stride, cos_sin));
  return true;
}

bool combine(Device* device, ConstMatrix pairs, const float* weights, std::int64_t top_k,
             Matrix y) {
  if (empty(y)) return true;
  DSFP4_TRY(launch(device, combine_kernel, grid_of(y.cols, y.rows), kThreads, 0, pairs, weights,
                   top_k, y));
  return true;
}

bool kv_append(Device* device, const KvRows* kv, ConstMatrix x) {
  if (kv->count == 0) return true;
  DSFP4_TRY(
      launch(device, kv_append_kernel, static_cast<unsigned>(kv->count), kThreads, 0, *kv, x));
  return true;
}

bool mla_inputs(Device* device, const MlaShape* shape, const KvRows* kv, ConstMatrix cos_sin,
                const float* kv_norm, float eps, Matrix q, Matrix x) {
  if (kv->count == 0) return true;
  const dim3 grid(1 + blocks_for(shape->heads * shape->qk_rope_head_dim / 2, kThreads),
                  static_cast<unsigned>(kv->count));
  DSFP4_TRY(launch(device, mla_inputs_kernel, grid, kThreads, 0, *shape, *kv, cos_sin, kv_norm, eps,
                   q, x));
  return true;
}

}  // namespace dsfp4::ops::cuda
