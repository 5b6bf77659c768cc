// y = x W^T for any shape, format and alignment: one warp a weight row, values decoded one by one.
// Reads a weight once for every kTokens tokens.
#include "ops/cuda/common.cuh"
#include "ops/cuda/decode.cuh"
#include "ops/cuda/kernels.h"

namespace dsfp4::ops::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kTokens = 8;

template <WeightFormat kFormat, bool kRound>
__global__ void __launch_bounds__(kWarps * 32)
    linear_plain_kernel(WeightView weight, ConstMatrix x, Matrix y) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t row = blockIdx.x * std::int64_t{kWarps} + threadIdx.x / 32;
  if (row >= weight.rows) return;
  const std::int64_t first = blockIdx.y * std::int64_t{kTokens};
  const int tokens = static_cast<int>(min(x.rows - first, std::int64_t{kTokens}));
  float sums[kTokens] = {};
  for (std::int64_t i = lane; i < weight.cols; i += 32) {
    const float w = weight_value<kFormat>(weight, row, i);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (t < tokens) {
        const float value = x.data[(first + t) * x.stride + i];
        sums[t] = fmaf(w, kRound ? round_bf16(value) : value, sums[t]);
      }
    }
  }
  const float scale = epilogue_scale(weight);
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const float sum = warp_sum(sums[t]);
    if (lane == 0 && t < tokens) y.data[(first + t) * y.stride + row] = sum * scale;
  }
}

template <WeightFormat kFormat>
void launch(cudaStream_t stream, const WeightView& weight, ConstMatrix x, Matrix y, Inputs inputs) {
  const dim3 grid(blocks_for(weight.rows, kWarps), blocks_for(x.rows, kTokens));
  if (inputs == Inputs::kF32) {
    linear_plain_kernel<kFormat, false><<<grid, kWarps * 32, 0, stream>>>(weight, x, y);
  } else {
    linear_plain_kernel<kFormat, true><<<grid, kWarps * 32, 0, stream>>>(weight, x, y);
  }
}

}  // namespace

bool linear_plain(Device* device, const WeightView& weight, ConstMatrix x, Matrix y,
                  Inputs inputs) {
  if (x.rows == 0 || weight.rows == 0) return true;
  switch (weight.format) {
    case WeightFormat::kF32:
      launch<WeightFormat::kF32>(device->stream, weight, x, y, inputs);
      break;
    case WeightFormat::kBF16:
      launch<WeightFormat::kBF16>(device->stream, weight, x, y, inputs);
      break;
    case WeightFormat::kFp8Block:
      launch<WeightFormat::kFp8Block>(device->stream, weight, x, y, inputs);
      break;
    case WeightFormat::kNvfp4:
      launch<WeightFormat::kNvfp4>(device->stream, weight, x, y, inputs);
      break;
    case WeightFormat::kMxfp4:
      launch<WeightFormat::kMxfp4>(device->stream, weight, x, y, inputs);
      break;
  }
  DSFP4_LAUNCHED("linear_plain_kernel");
  return true;
}

}  // namespace dsfp4::ops::cuda
