// y = x W^T for up to 8 tokens. Floor: the weight's bytes, read once. Blocks stay and take row
// tiles in turn; a tile's columns are split over some of a block's warps, whose sums are added in
// warp order.
#include "ops/cuda/kernels.h"
#include "ops/cuda/one_token.cuh"
#include "ops/cuda/small.cuh"

namespace dsfp4::ops::cuda {
namespace {

constexpr int kTile = 16;
constexpr int kSums = 128;  // of a warp: 16 rows x 8 tokens

template <WeightFormat kFormat, typename Product, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, 16 / kWarps)
    linear_small_kernel(WeightView weight, ConstMatrix x, Matrix y, int split) {
  extern __shared__ uint4 shared[];
  auto* parts = reinterpret_cast<float*>(shared);  // two sets of [warps][128]
  auto* rings = reinterpret_cast<std::byte*>(parts + 2 * kWarps * kSums);
  std::byte* staged = rings + kWarps * kSmallRingBytes;
  const int cols = static_cast<int>(weight.cols);
  const int weight_rows = static_cast<int>(weight.rows);
  const int tokens = static_cast<int>(x.rows);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int tiles = kWarps / split;  // of a block at a time
  const int rows = tiles * kTile;
  const float scale = Product::epilogue(weight.global_scale);
  int turn = 0;
  bool is_staged = false;
  stream_tiles<kFormat, Product>(
      {static_cast<int>(blockIdx.x) * rows, weight_rows, static_cast<int>(gridDim.x) * rows},
      warp % split, split, cols, tokens, rings + warp * kSmallRingBytes,
      [&](int base) {
        return Rows<kFormat>(weight.data, weight.scales, weight_rows, cols,
                             base + warp / split * kTile);
      },
      [&](int) -> const std::byte* {
        if (is_staged) return staged;
        begin_kernel();  // weights are on their way by now
        for (int t = 0; t < tokens; ++t) {
          Product::stage(x.data + t * x.stride, cols, staged + t * Product::token_bytes(cols),
                         static_cast<int>(threadIdx.x), kWarps * 32);
        }
        is_staged = true;
        __syncthreads();
        return staged;
      },
      [&](int base, const Product& product) {
        float sums[4];
        product.finish(sums);
        float* set = parts + turn * kWarps * kSums;
        turn ^= 1;
#pragma unroll
        for (int i = 0; i < 4; ++i) set[warp * kSums + lane * 4 + i] = sums[i];
        __syncthreads();
        for (int o = static_cast<int>(threadIdx.x); o < tiles * kSums; o += kWarps * 32) {
          const int from = o % kSums;
          const int token = from / 4 % 4 * 2 + from % 2;
          const int row = base + o / kSums * kTile + from % 4 / 2 * 8 + from / 16;
          if (token >= tokens || row >= weight_rows) continue;
          float sum = 0.0f;
          for (int s = 0; s < split; ++s) sum += set[(o / kSums * split + s) * kSums + from];
          y.data[token * y.stride + row] = sum * scale;
        }
      });
}

// Warps that share the columns of a row tile: each has four chunks at least.
template <WeightFormat kFormat>
int split_of(const WeightView& weight, int warps) {
  int split = warps;
  while (split > 1 && chunks_of<kFormat>(weight.cols) / split < 4) split /= 2;
  return split;
}

// Shared memory beside the tokens.
constexpr std::size_t parts_bytes(int warps) {
  return static_cast<std::size_t>(warps) * (2 * kSums * sizeof(float) + kSmallRingBytes);
}

template <WeightFormat kFormat, typename Product, int kWarps>
bool launch(Device* device, const WeightView& weight, ConstMatrix x, Matrix y) {
  constexpr std::size_t kParts = parts_bytes(kWarps);
  const auto token_bytes = static_cast<std::size_t>(Product::token_bytes(weight.cols));
  const auto limit = static_cast<std::size_t>(device->shared_bytes);
  const std::int64_t together = std::min<std::int64_t>(
      kSmallTokens, static_cast<std::int64_t>((limit - kParts) / token_bytes));
  if (together < 1 || !has_pieces(weight) || !has_fours(x))
    return linear_plain(device, weight, x, y, Inputs::kBf16);
  const int split = split_of<kFormat>(weight, kWarps);
  const std::int64_t groups = (weight.rows + kWarps / split * kTile - 1) / (kWarps / split * kTile);
  const auto kernel = linear_small_kernel<kFormat, Product, kWarps>;
  DSFP4_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 device->shared_bytes));
  for (std::int64_t first = 0; first < x.rows; first += together) {
    const std::int64_t count = std::min(together, x.rows - first);
    const ConstMatrix some{x.data + first * x.stride, count, x.cols, x.stride};
    const std::size_t bytes = kParts + static_cast<std::size_t>(count) * token_bytes;
    const int resident = kWarps == 8 && 2 * bytes + 4096 <= limit ? 2 : 1;
    const auto grid = static_cast<unsigned>(
        std::min<std::int64_t>(groups, std::int64_t{device->multiprocessors} * resident));
    const Matrix out{y.data + first * y.stride, count, y.cols, y.stride};
    DSFP4_TRY(
        ops::cuda::launch(device, kernel, grid, kWarps * 32, bytes, weight, some, out, split));
  }
  return true;
}

template <WeightFormat kFormat>
bool launch(Device* device, const WeightView& weight, ConstMatrix x, Matrix y) {
  if (x.rows > 1) return launch<kFormat, TokensProduct<kFormat>, 8>(device, weight, x, y);
  using Product = typename OneToken<kFormat>::Product;
  // Blocks of 16 warps stage the token half as often: where there is the room, and where they do
  // not leave multiprocessors idle by having several tiles each.
  const auto bytes = parts_bytes(16) + static_cast<std::size_t>(Product::token_bytes(weight.cols));
  const std::int64_t tiles = 16 / split_of<kFormat>(weight, 16);
  const bool wide = bytes <= static_cast<std::size_t>(device->shared_bytes) &&
                    (tiles == 1 || weight.rows >= device->multiprocessors * tiles * kTile);
  return wide ? launch<kFormat, Product, 16>(device, weight, x, y)
              : launch<kFormat, Product, 8>(device, weight, x, y);
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
