// The small products around latent attention (queries into the latent space, values out of it) and
// the router's product with FP32 inputs, for the widths of published models: rows are read 16 bytes
// (BF16) or 8 (FP8) a lane. Floor: the weight's bytes.
#include "ops/cuda/decode.cuh"
#include "ops/cuda/kernels.h"

namespace dsfp4::ops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kEight = 8;
constexpr int kTokens = 4;

// Eight neighbouring values of a row as floats.
template <WeightFormat kFormat>
__device__ __forceinline__ void load_eight(const WeightView& weight, std::int64_t row,
                                           std::int64_t col, float out[kEight]) {
  if constexpr (kFormat == WeightFormat::kF32) {
    const auto* from = reinterpret_cast<const float4*>(weight.data) + (row * weight.cols + col) / 4;
    const float4 low = __ldg(from);
    const float4 high = __ldg(from + 1);
    out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
    out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
  } else if constexpr (kFormat == WeightFormat::kBF16) {
    const uint4 words =
        __ldg(reinterpret_cast<const uint4*>(weight.data + (row * weight.cols + col) * 2));
    const unsigned w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = __uint_as_float(w[i] << 16);
      out[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
    }
  } else {
    const uint2 words =
        __ldg(reinterpret_cast<const uint2*>(weight.data + row * weight.cols + col));
    const unsigned w[2] = {words.x, words.y};
    constexpr std::int64_t kTile = ::dsfp4::format::kFp8Tile;
    const std::int64_t tiles = (weight.cols + kTile - 1) / kTile;
    const float scale =
        __ldg(reinterpret_cast<const float*>(weight.scales) + row / kTile * tiles + col / kTile);
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      out[i] = e4m3_value((w[i / 4] >> (8 * (i % 4))) & 0xffu) * scale;
    }
  }
}

// One block a head and 256 latent columns: warp w adds up rows w, w + 8, ... of W_UK, a lane has
// eight columns; the warps' sums are added in order.
template <WeightFormat kFormat>
__global__ void __launch_bounds__(kThreads)
    absorb_kernel(MlaShape shape, WeightView kv_b_proj, ConstMatrix q, Matrix q_abs) {
  __shared__ float parts[kWarps][32 * kEight];
  begin_kernel();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t head = blockIdx.y;
  const std::int64_t first_col = blockIdx.x * std::int64_t{32 * kEight};
  const std::int64_t nope = shape.qk_nope_head_dim;
  const std::int64_t first_row = head * (nope + shape.v_head_dim);
  for (std::int64_t first = 0; first < q.rows; first += kTokens) {
    const int tokens = static_cast<int>(min(q.rows - first, std::int64_t{kTokens}));
    float sums[kTokens][kEight] = {};
#pragma unroll 16
    for (std::int64_t i = warp; i < nope; i += kWarps) {
      float w[kEight];
      load_eight<kFormat>(kv_b_proj, first_row + i, first_col + lane * kEight, w);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (t >= tokens) continue;
        const float value =
            round_bf16(q.data[(first + t) * q.stride + head * shape.qk_head_dim() + i]);
#pragma unroll
        for (int j = 0; j < kEight; ++j) sums[t][j] = fmaf(value, w[j], sums[t][j]);
      }
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (t >= tokens) continue;
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kEight; ++j) parts[warp][lane * kEight + j] = sums[t][j];
      __syncthreads();
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += parts[w][threadIdx.x];
      q_abs.data[(first + t) * q_abs.stride + head * shape.kv_lora_rank + first_col + threadIdx.x] =
          sum;
    }
  }
}

// A warp does kRows rows of weight [.., cols]; `inputs(t)` is token t's row for them.
constexpr int kRows = 4;

template <WeightFormat kFormat, bool kRound, typename Input, typename Output>
__device__ __forceinline__ void dot_rows(const WeightView& weight, const std::int64_t rows[kRows],
                                         std::int64_t tokens, const Input& input,
                                         const Output& output) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (std::int64_t first = 0; first < tokens; first += kTokens) {
    const int count = static_cast<int>(min(tokens - first, std::int64_t{kTokens}));
    float sums[kRows][kTokens] = {};
#pragma unroll 2
    for (std::int64_t col = lane * kEight; col < weight.cols; col += 32 * kEight) {
      float w[kRows][kEight];
#pragma unroll
      for (int r = 0; r < kRows; ++r) load_eight<kFormat>(weight, rows[r], col, w[r]);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (t >= count) continue;
        const auto* from = reinterpret_cast<const float4*>(input(first + t) + col);
        const float4 low = from[0];
        const float4 high = from[1];
        const float x[kEight] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int j = 0; j < kEight; ++j) {
            sums[r][t] = fmaf(w[r][j], kRound ? round_bf16(x[j]) : x[j], sums[r][t]);
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const float sum = warp_sum(sums[r][t]);
        if (lane == 0 && t < count) output(first + t, r, sum);
      }
    }
  }
}

// out[t, h, i] = W_UV[h, i] . attended[t, h].
template <WeightFormat kFormat>
__global__ void __launch_bounds__(kThreads)
    expand_value_kernel(MlaShape shape, WeightView kv_b_proj, ConstMatrix attended, Matrix out) {
  begin_kernel();
  const std::int64_t first =
      (blockIdx.x * std::int64_t{kWarps} + threadIdx.x / 32) * kRows;  // v_head_dim % kRows == 0
  if (first >= shape.heads * shape.v_head_dim) return;
  const std::int64_t head = first / shape.v_head_dim;
  std::int64_t rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    rows[r] = head * (shape.qk_nope_head_dim + shape.v_head_dim) + shape.qk_nope_head_dim +
              first % shape.v_head_dim + r;
  }
  dot_rows<kFormat, true>(
      kv_b_proj, rows, attended.rows,
      [&](std::int64_t t) {
        return attended.data + t * attended.stride + head * shape.kv_lora_rank;
      },
      [&](std::int64_t t, int r, float sum) { out.data[t * out.stride + first + r] = sum; });
}

// y = x W^T with FP32 inputs: one block kRows rows, its warps the tokens in turn.
template <WeightFormat kFormat>
__global__ void __launch_bounds__(kThreads)
    linear_exact_kernel(WeightView weight, ConstMatrix x, Matrix y) {
  begin_kernel();
  const std::int64_t first = blockIdx.x * std::int64_t{kRows};
  std::int64_t rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) rows[r] = min(first + r, weight.rows - 1);
  const std::int64_t group = (blockIdx.y * std::int64_t{kWarps} + threadIdx.x / 32) * kTokens;
  if (group >= x.rows) return;
  const std::int64_t tokens = min(x.rows - group, std::int64_t{kTokens});
  dot_rows<kFormat, false>(
      weight, rows, tokens, [&](std::int64_t t) { return x.data + (group + t) * x.stride; },
      [&](std::int64_t t, int r, float sum) {
        if (first + r < weight.rows) y.data[(group + t) * y.stride + first + r] = sum;
      });
}

// One token: a block has one row, its warps share the columns.
template <WeightFormat kFormat>
__global__ void __launch_bounds__(kThreads)
    linear_exact_one_kernel(WeightView weight, ConstMatrix x, Matrix y) {
  begin_kernel();
  __shared__ float parts[kWarps];
  float sum = 0.0f;
#pragma unroll 4
  for (std::int64_t col = threadIdx.x * std::int64_t{kEight}; col < weight.cols;
       col += kThreads * kEight) {
    float w[kEight];
    load_eight<kFormat>(weight, blockIdx.x, col, w);
    const auto* from = reinterpret_cast<const float4*>(x.data + blockIdx.y * x.stride + col);
    const float4 low = from[0];
    const float4 high = from[1];
    const float v[kEight] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int j = 0; j < kEight; ++j) sum = fmaf(w[j], v[j], sum);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float all = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) all += parts[w];
    y.data[blockIdx.y * y.stride + blockIdx.x] = all;
  }
}

bool sixteen_bytes(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

template <WeightFormat kFormat>
bool exact(Device* device, const WeightView& weight, ConstMatrix x, Matrix y) {
  constexpr std::int64_t kFew = 4;
  if (x.rows <= kFew) {
    DSFP4_TRY(launch(device, linear_exact_one_kernel<kFormat>,
                     dim3(static_cast<unsigned>(weight.rows), static_cast<unsigned>(x.rows)),
                     kThreads, 0, weight, x, y));
  } else {
    DSFP4_TRY(launch(device, linear_exact_kernel<kFormat>,
                     dim3(blocks_for(weight.rows, kRows), blocks_for(x.rows, kWarps * kTokens)),
                     kThreads, 0, weight, x, y));
  }
  return true;
}

}  // namespace

bool head_products_fit(const MlaShape& shape, const WeightView& kv_b_proj, ConstMatrix attended) {
  return (kv_b_proj.format == WeightFormat::kBF16 || kv_b_proj.format == WeightFormat::kFp8Block) &&
         shape.kv_lora_rank % (32 * kEight) == 0 && shape.v_head_dim % kRows == 0 &&
         sixteen_bytes(kv_b_proj.data) && sixteen_bytes(attended.data) && attended.stride % 4 == 0;
}

bool absorb_fast(Device* device, const MlaShape& shape, const WeightView& kv_b_proj, ConstMatrix q,
                 Matrix q_abs) {
  const dim3 grid(static_cast<unsigned>(shape.kv_lora_rank / (32 * kEight)),
                  static_cast<unsigned>(shape.heads));
  const auto kernel = kv_b_proj.format == WeightFormat::kBF16
                          ? absorb_kernel<WeightFormat::kBF16>
                          : absorb_kernel<WeightFormat::kFp8Block>;
  DSFP4_TRY(launch(device, kernel, grid, kThreads, 0, shape, kv_b_proj, q, q_abs));
  return true;
}

bool expand_value_fast(Device* device, const MlaShape& shape, const WeightView& kv_b_proj,
                       ConstMatrix attended, Matrix out) {
  const unsigned grid = blocks_for(shape.heads * shape.v_head_dim, kWarps * kRows);
  const auto kernel = kv_b_proj.format == WeightFormat::kBF16
                          ? expand_value_kernel<WeightFormat::kBF16>
                          : expand_value_kernel<WeightFormat::kFp8Block>;
  DSFP4_TRY(launch(device, kernel, grid, kThreads, 0, shape, kv_b_proj, attended, out));
  return true;
}

bool linear_exact_fit(const WeightView& weight, ConstMatrix x) {
  return (weight.format == WeightFormat::kBF16 || weight.format == WeightFormat::kF32) &&
         weight.cols % kEight == 0 && x.stride % 4 == 0 && sixteen_bytes(weight.data) &&
         sixteen_bytes(x.data);
}

bool linear_exact(Device* device, const WeightView& weight, ConstMatrix x, Matrix y) {
  return weight.format == WeightFormat::kF32 ? exact<WeightFormat::kF32>(device, weight, x, y)
                                             : exact<WeightFormat::kBF16>(device, weight, x, y);
}

}  // namespace dsfp4::ops::cuda
