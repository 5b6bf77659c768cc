// The chosen experts of few tokens: two launches, gate + up + SiLU, then down with the weighted
// sum. Floor: the bytes of the chosen experts, each read once for every token that chose it.
// Experts are read through the device's table, so that their bytes may move between steps.
#include "ops/cuda/kernels.h"
#include "ops/cuda/small.cuh"

namespace dsfp4::ops::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kTile = 16;

// Work is (pair, row tile); a block takes a run of it. Even warps do gate_proj, odd ones up_proj,
// each a fourth of the columns. hidden [pairs, rows].
template <WeightFormat kFormat>
__global__ void __launch_bounds__(kWarps * 32, 2)
    gate_up_kernel(const ExpertView* table, const std::int32_t* used, int top_k, ConstMatrix x,
                   Matrix hidden) {
  extern __shared__ uint4 shared[];
  __shared__ float parts[2][kWarps][kTile];
  auto* staged = reinterpret_cast<__nv_bfloat16*>(shared);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t tiles = (hidden.cols + kTile - 1) / kTile;
  const std::int64_t work = tiles * hidden.rows;
  const std::int64_t begin = work * blockIdx.x / gridDim.x;
  const std::int64_t end = work * (blockIdx.x + 1) / gridDim.x;
  std::int64_t staged_token = -1;
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t pair = i / tiles;
    const std::int64_t row = i % tiles * kTile;
    const std::int64_t token = pair / top_k;
    if (token != staged_token) {
      __syncthreads();
      stage_token<kFormat>(x.data + token * x.stride, x.cols, staged);
      __syncthreads();
      staged_token = token;
    }
    const ExpertView& expert = table[used[pair]];
    const WeightView& weight = warp % 2 == 0 ? expert.gate_proj : expert.up_proj;
    float sums[4] = {};
    multiply_rows<kFormat, 4>(weight, row, warp / 2, kWarps / 2, staged, 0, 1, sums);
    float(*set)[kTile] = parts[i % 2];
    if (lane % 4 == 0) {  // token 0
      set[warp][lane / 4] = sums[0];
      set[warp][lane / 4 + 8] = sums[2];
    }
    __syncthreads();
    if (threadIdx.x < kTile && row + threadIdx.x < hidden.cols) {
      float gate = 0.0f;
      float up = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; w += 2) {
        gate += set[w][threadIdx.x];
        up += set[w + 1][threadIdx.x];
      }
      gate *= word_epilogue(expert.gate_proj);
      up *= word_epilogue(expert.up_proj);
      hidden.data[pair * hidden.stride + row + threadIdx.x] = silu(gate) * up;
    }
  }
}

// Work is (token, row tile). Warp k does slot k, and the slots are summed in order.
template <WeightFormat kFormat>
__global__ void __launch_bounds__(512, 1)
    down_kernel(const ExpertView* table, const std::int32_t* used, const float* weights, int top_k,
                ConstMatrix hidden, Matrix y) {
  extern __shared__ uint4 shared[];
  constexpr int kMostSlots = 16;
  __shared__ float parts[2][kMostSlots][kTile];
  auto* staged = reinterpret_cast<__nv_bfloat16*>(shared);
  const int slot = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t stride = staged_stride<kFormat>(hidden.cols);
  const std::int64_t tiles = (y.cols + kTile - 1) / kTile;
  const std::int64_t work = tiles * y.rows;
  const std::int64_t begin = work * blockIdx.x / gridDim.x;
  const std::int64_t end = work * (blockIdx.x + 1) / gridDim.x;
  std::int64_t staged_token = -1;
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t token = i / tiles;
    const std::int64_t row = i % tiles * kTile;
    if (token != staged_token) {
      __syncthreads();
      for (int k = 0; k < top_k; ++k) {
        stage_token<kFormat>(hidden.data + (token * top_k + k) * hidden.stride, hidden.cols,
                             staged + k * stride);
      }
      __syncthreads();
      staged_token = token;
    }
    const WeightView& down = table[used[token * top_k + slot]].down_proj;
    float sums[4] = {};
    multiply_rows<kFormat, 4>(down, row, 0, 1, staged + slot * stride, 0, 1, sums);
    float(*set)[kTile] = parts[i % 2];
    if (lane % 4 == 0) {
      const float scale = word_epilogue(down) * weights[token * top_k + slot];
      set[slot][lane / 4] = sums[0] * scale;
      set[slot][lane / 4 + 8] = sums[2] * scale;
    }
    __syncthreads();
    if (threadIdx.x < kTile && row + threadIdx.x < y.cols) {
      float* to = y.data + token * y.stride + row + threadIdx.x;
      float sum = *to;
      for (int k = 0; k < top_k; ++k) sum += set[k][threadIdx.x];
      *to = sum;
    }
  }
}

template <WeightFormat kFormat>
bool launch(Device* device, const ExpertView* table, DeviceRouting routing, std::int64_t top_k,
            ConstMatrix x, Matrix hidden, Matrix y) {
  const auto gate_bytes = static_cast<std::size_t>(staged_stride<kFormat>(x.cols)) * 2;
  const auto down_bytes = static_cast<std::size_t>(top_k * staged_stride<kFormat>(hidden.cols)) * 2;
  DSFP4_TRY(cudaFuncSetAttribute(gate_up_kernel<kFormat>,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(gate_bytes)));
  DSFP4_TRY(cudaFuncSetAttribute(down_kernel<kFormat>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(down_bytes)));
  const auto grid = [&](std::int64_t work, int resident) {
    return static_cast<unsigned>(
        std::min<std::int64_t>(work, std::int64_t{device->multiprocessors} * resident));
  };
  const std::int64_t gate_work = (hidden.cols + kTile - 1) / kTile * hidden.rows;
  gate_up_kernel<kFormat><<<grid(gate_work, 2), kWarps * 32, gate_bytes, device->stream>>>(
      table, routing.used, static_cast<int>(top_k), x, hidden);
  DSFP4_LAUNCHED("gate_up_kernel");
  const std::int64_t down_work = (y.cols + kTile - 1) / kTile * y.rows;
  down_kernel<kFormat>
      <<<grid(down_work, 2), static_cast<unsigned>(top_k) * 32, down_bytes, device->stream>>>(
          table, routing.used, routing.weights, static_cast<int>(top_k), hidden, y);
  DSFP4_LAUNCHED("down_kernel");
  return true;
}

}  // namespace

bool experts_small_fit(Device* device, const ExpertView& expert, std::int64_t top_k) {
  const WeightFormat format = expert.gate_proj.format;
  if (expert.up_proj.format != format || expert.down_proj.format != format || top_k > 16 ||
      !has_words(expert.gate_proj) || !has_words(expert.up_proj) || !has_words(expert.down_proj)) {
    return false;
  }
  const std::int64_t most = std::max(expert.gate_proj.cols, top_k * (expert.down_proj.cols + 160));
  return (most + 1024) * 2 + 8192 <= device->shared_bytes;
}

bool experts_small(Device* device, const ExpertView* table, const ExpertView& first,
                   DeviceRouting routing, std::int64_t top_k, ConstMatrix x, Matrix hidden,
                   Matrix y) {
  switch (first.gate_proj.format) {
    case WeightFormat::kBF16:
      return launch<WeightFormat::kBF16>(device, table, routing, top_k, x, hidden, y);
    case WeightFormat::kFp8Block:
      return launch<WeightFormat::kFp8Block>(device, table, routing, top_k, x, hidden, y);
    case WeightFormat::kNvfp4:
      return launch<WeightFormat::kNvfp4>(device, table, routing, top_k, x, hidden, y);
    case WeightFormat::kMxfp4:
      return launch<WeightFormat::kMxfp4>(device, table, routing, top_k, x, hidden, y);
    case WeightFormat::kF32:
      break;
  }
  return fail(cudaErrorInvalidValue, "experts_small of FP32 experts", __FILE__, __LINE__);
}

}  // namespace dsfp4::ops::cuda
