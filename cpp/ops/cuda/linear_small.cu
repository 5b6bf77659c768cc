// y = x W^T for up to 8 tokens and one weight, or two. Floor: the weights' bytes, read once. Blocks
// stay and take row tiles in turn; a tile's columns are split over some of a block's warps, whose
// sums are added in warp order.
#include "ops/cuda/kernels.h"
#include "ops/cuda/one_token.cuh"
#include "ops/cuda/small.cuh"

namespace dsfp4::ops::cuda {
namespace {

constexpr int kTile = 16;
constexpr int kSums = 128;  // of a warp: 16 rows x 8 tokens

// The pieces of a warp on their way: one token leaves room for more.
constexpr int ring_of(int warps) { return warps == 16 ? 4 : 3; }

// A weight, and where its product goes.
struct Part {
  WeightView weight;
  Matrix y;
};

// kPair: there is a second weight; for one token, as the choice costs registers.
template <WeightFormat kFormat, typename Product, int kWarps, bool kPair>
__global__ void __launch_bounds__(kWarps * 32, 16 / kWarps)
    linear_small_kernel(const __grid_constant__ Part first, const __grid_constant__ Part second,
                        ConstMatrix x, int split) {
  constexpr int kRingBytes = ring_of(kWarps) * kSlotBytes;
  extern __shared__ uint4 shared[];
  auto* parts = reinterpret_cast<float*>(shared);  // two sets of [warps][128]
  auto* rings = reinterpret_cast<std::byte*>(parts + 2 * kWarps * kSums);
  std::byte* staged = rings + kWarps * kRingBytes;
  const int cols = static_cast<int>(first.weight.cols);
  const int pieces = pieces_of<kFormat>(cols);
  const int tokens = static_cast<int>(x.rows);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int tiles = kWarps / split;  // of a block at a time
  const int rows = tiles * kTile;
  const int first_rows = static_cast<int>(first.weight.rows);
  const int second_rows = kPair ? static_cast<int>(second.weight.rows) : 0;
  const int before = kPair ? (first_rows + rows - 1) / rows * rows : 0;  // the second's begin there
  const auto is_second = [&](int base) { return kPair && base >= before; };
  int turn = 0;
  bool is_staged = false;
  stream_tiles<kFormat, Product, ring_of(kWarps)>(
      {static_cast<int>(blockIdx.x) * rows, kPair ? before + second_rows : first_rows,
       static_cast<int>(gridDim.x) * rows},
      warp % split, split, {shared_address(staged), pieces}, tokens,
      shared_address(rings + warp * kRingBytes),
      [&](int base) {
        const int row = base + warp / split * kTile;
        if (is_second(base)) {
          return Rows<kFormat>(second.weight.data, second.weight.scales, second_rows, cols,
                               row - before);
        }
        return Rows<kFormat>(first.weight.data, first.weight.scales, first_rows, cols, row);
      },
      [&](int) {
        if (is_staged) return;
        begin_kernel();  // weights are on their way by now
        for (int t = 0; t < tokens; ++t) {
          Product::stage(x.data + t * x.stride, cols, staged + t * Product::token_bytes(pieces),
                         static_cast<int>(threadIdx.x), kWarps * 32);
        }
        is_staged = true;
        __syncthreads();
      },
      [&](int base, const Product& product) {
        const bool other = is_second(base);
        const Matrix& y = other ? second.y : first.y;
        const int weight_rows = other ? second_rows : first_rows;
        const int from_row = other ? base - before : base;
        const float scale =
            Product::epilogue(other ? second.weight.global_scale : first.weight.global_scale);
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
          const int row = from_row + o / kSums * kTile + from % 4 / 2 * 8 + from / 16;
          if (token >= tokens || row >= weight_rows) continue;
          float sum = 0.0f;
          for (int s = 0; s < split; ++s) sum += set[(o / kSums * split + s) * kSums + from];
          y.data[token * y.stride + row] = sum * scale;
        }
      });
}

// Warps that share the columns of a row tile: each has two pieces at least.
template <WeightFormat kFormat>
int split_of(const WeightView& weight, int warps) {
  int split = warps;
  while (split > 1 && pieces_of<kFormat>(weight.cols) / split < 2) split /= 2;
  return split;
}

// Shared memory beside the tokens.
constexpr std::size_t parts_bytes(int warps) {
  return static_cast<std::size_t>(warps) *
         (2 * kSums * sizeof(float) + static_cast<std::size_t>(ring_of(warps) * kSlotBytes));
}

template <WeightFormat kFormat, typename Product, int kWarps, bool kPair = false>
bool launch(Device* device, const Part& first, const Part& second, ConstMatrix x) {
  const WeightView& weight = first.weight;
  constexpr std::size_t kParts = parts_bytes(kWarps);
  const auto token_bytes =
      static_cast<std::size_t>(Product::token_bytes(pieces_of<kFormat>(weight.cols)));
  const auto limit = static_cast<std::size_t>(device->shared_bytes);
  const std::int64_t together = std::min<std::int64_t>(
      kSmallTokens, static_cast<std::int64_t>((limit - kParts) / token_bytes));
  if (together < 1 || !has_pieces(weight) || !has_fours(x) ||
      (kPair && !has_pieces(second.weight))) {
    return linear_plain(device, weight, x, first.y, Inputs::kBf16) &&
           linear_plain(device, second.weight, x, second.y, Inputs::kBf16);
  }
  const int split = split_of<kFormat>(weight, kWarps);
  const std::int64_t rows = kWarps / split * kTile;
  const std::int64_t groups =
      (weight.rows + rows - 1) / rows + (second.weight.rows + rows - 1) / rows;
  const auto kernel = linear_small_kernel<kFormat, Product, kWarps, kPair>;
  DSFP4_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 device->shared_bytes));
  for (std::int64_t at = 0; at < x.rows; at += together) {
    const std::int64_t count = std::min(together, x.rows - at);
    const ConstMatrix some{x.data + at * x.stride, count, x.cols, x.stride};
    const auto from = [&](Part part) {
      part.y.data += at * part.y.stride;
      return part;
    };
    const std::size_t bytes = kParts + static_cast<std::size_t>(count) * token_bytes;
    const int resident = kWarps == 8 && 2 * bytes + 4096 <= limit ? 2 : 1;
    const auto grid = static_cast<unsigned>(
        std::min<std::int64_t>(groups, std::int64_t{device->multiprocessors} * resident));
    DSFP4_TRY(ops::cuda::launch(device, kernel, grid, kWarps * 32, bytes, from(first), from(second),
                                some, split));
  }
  return true;
}

template <WeightFormat kFormat, bool kPair>
bool launch_for_one(Device* device, const Part& first, const Part& second, ConstMatrix x) {
  using Product = typename OneToken<kFormat>::Product;
  const WeightView& weight = first.weight;
  // Blocks of 16 warps stage the token half as often: where there is the room, and where they do
  // not leave multiprocessors idle by having several tiles each.
  const auto bytes = parts_bytes(16) + static_cast<std::size_t>(
                                           Product::token_bytes(pieces_of<kFormat>(weight.cols)));
  const std::int64_t tiles = 16 / split_of<kFormat>(weight, 16);
  const bool wide =
      bytes <= static_cast<std::size_t>(device->shared_bytes) &&
      (tiles == 1 || weight.rows + second.weight.rows >= device->multiprocessors * tiles * kTile);
  return wide ? launch<kFormat, Product, 16, kPair>(device, first, second, x)
              : launch<kFormat, Product, 8, kPair>(device, first, second, x);
}

template <WeightFormat kFormat>
bool launch(Device* device, const Part& first, const Part& second, ConstMatrix x) {
  const bool pair = second.weight.rows > 0;
  if (x.rows == 1) {
    return pair ? launch_for_one<kFormat, true>(device, first, second, x)
                : launch_for_one<kFormat, false>(device, first, second, x);
  }
  using Product = TokensProduct<kFormat>;
  const Part none = {};
  return launch<kFormat, Product, 8>(device, first, none, x) &&
         (!pair || launch<kFormat, Product, 8>(device, second, none, x));
}

bool launch(Device* device, const Part& first, const Part& second, ConstMatrix x) {
  switch (first.weight.format) {
    case WeightFormat::kBF16:
      return launch<WeightFormat::kBF16>(device, first, second, x);
    case WeightFormat::kFp8Block:
      return launch<WeightFormat::kFp8Block>(device, first, second, x);
    case WeightFormat::kNvfp4:
      return launch<WeightFormat::kNvfp4>(device, first, second, x);
    case WeightFormat::kMxfp4:
      return launch<WeightFormat::kMxfp4>(device, first, second, x);
    case WeightFormat::kF32:
      break;
  }
  return linear_plain(device, first.weight, x, first.y, Inputs::kBf16) &&
         linear_plain(device, second.weight, x, second.y, Inputs::kBf16);
}

}  // namespace

bool linear_small(Device* device, const WeightView& weight, ConstMatrix x, Matrix y) {
  return launch(device, {weight, y}, {}, x);
}

bool linear_small_pair(Device* device, const WeightView& first, Matrix y_first,
                       const WeightView& second, Matrix y_second, ConstMatrix x) {
  return launch(device, {first, y_first}, {second, y_second}, x);
}

}  // namespace dsfp4::ops::cuda
