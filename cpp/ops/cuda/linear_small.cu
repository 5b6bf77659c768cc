// y = x W^T for up to 8 tokens. Floor: the weight's bytes, read once. Blocks stay and take row
// tiles in turn; a tile's columns are split over some of a block's warps, whose sums are added in
// warp order.
#include "ops/cuda/kernels.h"
#include "ops/cuda/small.cuh"

namespace dsfp4::ops::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kTile = 16;
constexpr int kSums = 128;  // of a warp: 16 rows x 8 tokens

template <WeightFormat kFormat>
__global__ void __launch_bounds__(kWarps * 32, 2)
    linear_small_kernel(WeightView weight, ConstMatrix x, Matrix y, int split) {
  extern __shared__ uint4 shared[];
  auto* parts = reinterpret_cast<float*>(shared);  // two sets of [warps][128]
  auto* staged = reinterpret_cast<__nv_bfloat16*>(parts + 2 * kWarps * kSums);
  const std::int64_t stride = staged_stride<kFormat>(weight.cols);
  const int tokens = static_cast<int>(x.rows);
  for (int t = 0; t < tokens; ++t) {
    stage_token<kFormat>(x.data + t * x.stride, weight.cols, staged + t * stride);
  }
  __syncthreads();

  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int tiles = kWarps / split;  // of a block at a time
  const std::int64_t rows = std::int64_t{tiles} * kTile;
  const float scale = word_epilogue(weight);
  int turn = 0;
  for (std::int64_t base = blockIdx.x * rows; base < weight.rows; base += gridDim.x * rows) {
    float sums[4] = {};
    multiply_rows<kFormat, 4>(weight, base + warp / split * kTile, warp % split, split, staged,
                              stride, tokens, sums);
    float* set = parts + turn * kWarps * kSums;
    turn ^= 1;
#pragma unroll
    for (int i = 0; i < 4; ++i) set[warp * kSums + lane * 4 + i] = sums[i];
    __syncthreads();
    for (int o = static_cast<int>(threadIdx.x); o < tiles * kSums; o += kWarps * 32) {
      const int from = o % kSums;
      const int token = from / 4 % 4 * 2 + from % 2;
      const std::int64_t row = base + o / kSums * kTile + from % 4 / 2 * 8 + from / 16;
      if (token >= tokens || row >= weight.rows) continue;
      float sum = 0.0f;
      for (int s = 0; s < split; ++s) sum += set[(o / kSums * split + s) * kSums + from];
      y.data[token * y.stride + row] = sum * scale;
    }
  }
}

template <WeightFormat kFormat>
bool launch(Device* device, const WeightView& weight, ConstMatrix x, Matrix y) {
  constexpr int kChunk = Words<kFormat>::kChunk;
  constexpr std::size_t kParts = 2 * kWarps * kSums * sizeof(float);
  const auto token_bytes = static_cast<std::size_t>(staged_stride<kFormat>(weight.cols)) * 2;
  const auto limit = static_cast<std::size_t>(device->shared_bytes);
  const std::int64_t together = std::min<std::int64_t>(
      kSmallTokens, static_cast<std::int64_t>((limit - kParts) / token_bytes));
  if (together < 1) return linear_plain(device, weight, x, y, Inputs::kBf16);
  const std::int64_t chunks = (weight.cols + kChunk - 1) / kChunk;
  int split = kWarps;
  while (split > 1 && chunks / split < 4) split /= 2;
  const std::int64_t groups = (weight.rows + kWarps / split * kTile - 1) / (kWarps / split * kTile);
  DSFP4_TRY(cudaFuncSetAttribute(linear_small_kernel<kFormat>,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 device->shared_bytes));
  for (std::int64_t first = 0; first < x.rows; first += together) {
    const std::int64_t count = std::min(together, x.rows - first);
    const ConstMatrix some{x.data + first * x.stride, count, x.cols, x.stride};
    const std::size_t bytes = kParts + static_cast<std::size_t>(count) * token_bytes;
    const int resident = 2 * bytes + 4096 <= limit ? 2 : 1;
    const auto grid = static_cast<unsigned>(
        std::min<std::int64_t>(groups, std::int64_t{device->multiprocessors} * resident));
    linear_small_kernel<kFormat><<<grid, kWarps * 32, bytes, device->stream>>>(
        weight, some, {y.data + first * y.stride, count, y.cols, y.stride}, split);
    DSFP4_LAUNCHED("linear_small_kernel");
  }
  return true;
}

}  // namespace

bool linear_small(Device* device, const WeightView& weight, ConstMatrix x, Matrix y) {
  switch (weight.format) {
    case WeightFormat::kBF16:
      return launch<WeightFormat::kBF16>(device, weight, x, y);
    case WeightFormat::kFp8Block:
      return launch<WeightFormat::kFp8Block>(device, weight, x, y);
    case WeightFormat::kNvfp4:
      return launch<WeightFormat::kNvfp4>(device, weight, x, y);
    case WeightFormat::kMxfp4:
      return launch<WeightFormat::kMxfp4>(device, weight, x, y);
    case WeightFormat::kF32:
      break;
  }
  return linear_plain(device, weight, x, y, Inputs::kBf16);
}

}  // namespace dsfp4::ops::cuda
