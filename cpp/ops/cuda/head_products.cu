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

// Eight neighbouring values of a row, as stored. Kernels load their first ones before they wait for
// their inputs: weights are there already.
template <WeightFormat kFormat>
struct Eight {
  static constexpr int kWords = kFormat == WeightFormat::kF32    ? 8
                                : kFormat == WeightFormat::kBF16 ? 4
                                                                 : 2;
  unsigned words[kWords];
  float scale;  // FP8

  __device__ __forceinline__ void load(const WeightView& weight, std::int64_t row,
                                       std::int64_t col) {
    const std::int64_t at = row * weight.cols + col;
    if constexpr (kFormat == WeightFormat::kFp8Block) {
      const uint2 codes = __ldg(reinterpret_cast<const uint2*>(weight.data + at));
      words[0] = codes.x, words[1] = codes.y;
      constexpr std::int64_t kTile = ::dsfp4::format::kFp8Tile;
      const std::int64_t tiles = (weight.cols + kTile - 1) / kTile;
      scale =
          __ldg(reinterpret_cast<const float*>(weight.scales) + row / kTile * tiles + col / kTile);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const auto* from = reinterpret_cast<const uint4*>(weight.data + at * (kWords / 2));
        const uint4 four = __ldg(from + i / 4);
        words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
      }
    }
  }

  __device__ __forceinline__ void decode(float out[kEight]) const {
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      if constexpr (kFormat == WeightFormat::kF32) {
        out[i] = __uint_as_float(words[i]);
      } else if constexpr (kFormat == WeightFormat::kBF16) {
        out[i] = __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
      } else {
        out[i] = e4m3_value((words[i / 4] >> (8 * (i % 4))) & 0xffu) * scale;
      }
    }
  }
};

__device__ __forceinline__ void load_floats(const float* from, float out[kEight]) {
  const float4 low = reinterpret_cast<const float4*>(from)[0];
  const float4 high = reinterpret_cast<const float4*>(from)[1];
  out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
  out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
}

// One block a head and 256 latent columns: warp w adds up rows w, w + 8, ... of W_UK, a lane has
// eight columns; the warps' sums are added in order. kTokens at a time.
template <WeightFormat kFormat, int kTokens>
__global__ void __launch_bounds__(kThreads, 2)
    absorb_kernel(MlaShape shape, WeightView kv_b_proj, ConstMatrix q, Matrix q_abs) {
  __shared__ float parts[kWarps][32 * kEight];
  constexpr int kAhead = kTokens == 1 ? 16 : 0;  // a warp has 16 rows of a head of 128
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t head = blockIdx.y;
  const std::int64_t first_col = blockIdx.x * std::int64_t{32 * kEight};
  const int nope = static_cast<int>(shape.qk_nope_head_dim);
  const std::int64_t first_row = head * (nope + shape.v_head_dim);
  Eight<kFormat> ahead[kAhead + 1];
#pragma unroll
  for (int j = 0; j < kAhead; ++j) {
    const int i = warp + j * kWarps;
    if (i < nope) ahead[j].load(kv_b_proj, first_row + i, first_col + lane * kEight);
  }
  begin_kernel();
  for (std::int64_t first = 0; first < (kTokens == 1 ? 1 : q.rows); first += kTokens) {
    const int tokens = static_cast<int>(min(q.rows - first, std::int64_t{kTokens}));
    float sums[kTokens][kEight] = {};
    const auto add = [&](const Eight<kFormat>& eight, int i) {
      float w[kEight];
      eight.decode(w);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (t >= tokens) continue;
        const float value =
            round_bf16(q.data[(first + t) * q.stride + head * shape.qk_head_dim() + i]);
#pragma unroll
        for (int j = 0; j < kEight; ++j) sums[t][j] = fmaf(value, w[j], sums[t][j]);
      }
    };
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (warp + j * kWarps < nope) add(ahead[j], warp + j * kWarps);
    }
#pragma unroll 4
    for (int i = warp + kAhead * kWarps; i < nope; i += kWarps) {
      Eight<kFormat> eight;
      eight.load(kv_b_proj, first_row + i, first_col + lane * kEight);
      add(eight, i);
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

// A warp does kRows rows of weight [.., cols]; `inputs(t)` is token t's row for them. Begins the
// kernel.
constexpr int kRows = 4;

template <WeightFormat kFormat, int kTokens, bool kRound, typename Input, typename Output>
__device__ __forceinline__ void dot_rows(const WeightView& weight, const std::int64_t rows[kRows],
                                         std::int64_t tokens, const Input& input,
                                         const Output& output) {
  constexpr int kAhead = kTokens == 1 ? 2 : 0;  // steps: a latent has two
  constexpr int kStep = 32 * kEight;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int cols = static_cast<int>(weight.cols);
  Eight<kFormat> ahead[kAhead + 1][kRows];
  const auto load = [&](Eight<kFormat>* eights, int col) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) eights[r].load(weight, rows[r], col);
  };
#pragma unroll
  for (int s = 0; s < kAhead; ++s) {
    if (lane * kEight + s * kStep < cols) load(ahead[s], lane * kEight + s * kStep);
  }
  begin_kernel();
  for (std::int64_t first = 0; first < (kTokens == 1 ? 1 : tokens); first += kTokens) {
    const int count = static_cast<int>(min(tokens - first, std::int64_t{kTokens}));
    float sums[kRows][kTokens] = {};
    const auto add = [&](const Eight<kFormat>* eights, int col) {
      float w[kRows][kEight];
#pragma unroll
      for (int r = 0; r < kRows; ++r) eights[r].decode(w[r]);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (t >= count) continue;
        float x[kEight];
        load_floats(input(first + t) + col, x);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int j = 0; j < kEight; ++j) {
            sums[r][t] = fmaf(w[r][j], kRound ? round_bf16(x[j]) : x[j], sums[r][t]);
          }
        }
      }
    };
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (lane * kEight + s * kStep < cols) add(ahead[s], lane * kEight + s * kStep);
    }
#pragma unroll 2
    for (int col = lane * kEight + kAhead * kStep; col < cols; col += kStep) {
      Eight<kFormat> eights[kRows];
      load(eights, col);
      add(eights, col);
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
template <WeightFormat kFormat, int kTokens>
__global__ void __launch_bounds__(kThreads, kTokens == 1 ? 3 : 2)
    expand_value_kernel(MlaShape shape, WeightView kv_b_proj, ConstMatrix attended, Matrix out) {
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
  dot_rows<kFormat, kTokens, true>(
      kv_b_proj, rows, attended.rows,
      [&](std::int64_t t) {
        return attended.data + t * attended.stride + head * shape.kv_lora_rank;
      },
      [&](std::int64_t t, int r, float sum) { out.data[t * out.stride + first + r] = sum; });
}

// y = x W^T with FP32 inputs: one block kRows rows, its warps the tokens in turn.
constexpr int kExactTokens = 4;

template <WeightFormat kFormat>
__global__ void __launch_bounds__(kThreads)
    linear_exact_kernel(WeightView weight, ConstMatrix x, Matrix y) {
  const std::int64_t first = blockIdx.x * std::int64_t{kRows};
  std::int64_t rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) rows[r] = min(first + r, weight.rows - 1);
  const std::int64_t group = (blockIdx.y * std::int64_t{kWarps} + threadIdx.x / 32) * kExactTokens;
  if (group >= x.rows) return;
  const std::int64_t tokens = min(x.rows - group, std::int64_t{kExactTokens});
  dot_rows<kFormat, kExactTokens, false>(
      weight, rows, tokens, [&](std::int64_t t) { return x.data + (group + t) * x.stride; },
      [&](std::int64_t t, int r, float sum) {
        if (first + r < weight.rows) y.data[(group + t) * y.stride + first + r] = sum;
      });
}

// One token: a block has one row, its warps share the columns.
template <WeightFormat kFormat>
__global__ void __launch_bounds__(kThreads)
    linear_exact_one_kernel(WeightView weight, ConstMatrix x, Matrix y) {
  __shared__ float parts[kWarps];
  constexpr int kAhead = 4;
  constexpr int kStep = kThreads * kEight;
  const int cols = static_cast<int>(weight.cols);
  const int first = static_cast<int>(threadIdx.x) * kEight;
  Eight<kFormat> ahead[kAhead];
#pragma unroll
  for (int s = 0; s < kAhead; ++s) {
    if (first + s * kStep < cols) ahead[s].load(weight, blockIdx.x, first + s * kStep);
  }
  begin_kernel();
  float sum = 0.0f;
  const auto add = [&](const Eight<kFormat>& eight, int col) {
    float w[kEight];
    eight.decode(w);
    float v[kEight];
    load_floats(x.data + blockIdx.y * x.stride + col, v);
#pragma unroll
    for (int j = 0; j < kEight; ++j) sum = fmaf(w[j], v[j], sum);
  };
#pragma unroll
  for (int s = 0; s < kAhead; ++s) {
    if (first + s * kStep < cols) add(ahead[s], first + s * kStep);
  }
  for (int col = first + kAhead * kStep; col < cols; col += kStep) {
    Eight<kFormat> eight;
    eight.load(weight, blockIdx.x, col);
    add(eight, col);
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
    DSFP4_TRY(
        launch(device, linear_exact_kernel<kFormat>,
               dim3(blocks_for(weight.rows, kRows), blocks_for(x.rows, kWarps * kExactTokens)),
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
  const bool bf16 = kv_b_proj.format == WeightFormat::kBF16;
  const auto one =
      bf16 ? absorb_kernel<WeightFormat::kBF16, 1> : absorb_kernel<WeightFormat::kFp8Block, 1>;
  const auto more =
      bf16 ? absorb_kernel<WeightFormat::kBF16, 4> : absorb_kernel<WeightFormat::kFp8Block, 4>;
  DSFP4_TRY(
      launch(device, q.rows == 1 ? one : more, grid, kThreads, 0, shape, kv_b_proj, q, q_abs));
  return true;
}

bool expand_value_fast(Device* device, const MlaShape& shape, const WeightView& kv_b_proj,
                       ConstMatrix attended, Matrix out) {
  const unsigned grid = blocks_for(shape.heads * shape.v_head_dim, kWarps * kRows);
  const bool bf16 = kv_b_proj.format == WeightFormat::kBF16;
  const auto one = bf16 ? expand_value_kernel<WeightFormat::kBF16, 1>
                        : expand_value_kernel<WeightFormat::kFp8Block, 1>;
  const auto more = bf16 ? expand_value_kernel<WeightFormat::kBF16, 4>
                         : expand_value_kernel<WeightFormat::kFp8Block, 4>;
  DSFP4_TRY(launch(device, attended.rows == 1 ? one : more, grid, kThreads, 0, shape, kv_b_proj,
                   attended, out));
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
