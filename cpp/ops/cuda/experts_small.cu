// The chosen experts of few tokens: two launches, gate + up + SiLU, then down with the weighted
// sum, or by pairs without it. Floor: the bytes of the chosen experts, each read once for every
// token that chose it. Experts are read through the device's table, so that they may move between
// steps.
#include "ops/cuda/kernels.h"
#include "ops/cuda/one_token.cuh"
#include "ops/cuda/small.cuh"
#include "ops/cuda/task_list.cuh"

namespace dsfp4::ops::cuda {
namespace {

constexpr int kTile = 16;
constexpr int kRing = 3;
constexpr int kRingBytes = kRing * kSlotBytes;

constexpr int kMostPairs = 64;  // of a launch
constexpr int kMostDownWarps = 18;

// The experts of a launch: `slots` pairs a token, of which the first top_k were chosen; then, if
// there is one more, the shared expert, of weight 1.
struct Chosen {
  static constexpr bool kListed = false;
  const ExpertView* table;
  int experts;  // in the table
  const std::int32_t* used;
  const float* weights;
  int top_k, slots;
  ExpertView shared;

  __device__ __forceinline__ int token(int pair) const { return pair / slots; }
};

// Pairs by themselves, each like a token of one slot: listed pair i is pair pairs[i] of the step,
// and its expert table[used[i]]. These may be written again between steps, so nothing of them is
// read before the kernel before has ended.
struct Listed {
  static constexpr bool kListed = true;
  static constexpr int slots = 1;
  const ExpertView* table;
  int experts;
  const std::int32_t* used;
  const std::int32_t* pairs;
  int top_k;

  __device__ __forceinline__ int token(int pair) const { return pairs[pair] / top_k; }
};

// What a launch needs of one matrix of an expert.
struct Source {
  const std::byte* data;
  const std::byte* scales;
  float scale;  // of the sums
};

// That of gate_proj, up_proj or down_proj for a pair. The choice is read past the first-level
// cache: down_kernel does so before it waits, when that cache may still have the choice of another
// layer.
template <typename Product>
__device__ __forceinline__ Source source_of(const Chosen& chosen, int pair,
                                            WeightView ExpertView::*matrix) {
  const int slot = pair % chosen.slots;
  const WeightView& weight =
      (slot == chosen.top_k
           ? chosen.shared
           : chosen.table[__ldcg(chosen.used + pair / chosen.slots * chosen.top_k + slot)]).*
      matrix;
  return {weight.data, weight.scales, Product::epilogue(weight.global_scale)};
}

template <typename Product>
__device__ __forceinline__ Source source_of(const Listed& listed, int pair,
                                            WeightView ExpertView::*matrix) {
  const WeightView& weight = listed.table[listed.used[pair]].*matrix;
  return {weight.data, weight.scales, Product::epilogue(weight.global_scale)};
}

// This block's part of all work: blocks that run together read what lies together.
__device__ __forceinline__ Tiles share_of(int work) {
  return {static_cast<int>(blockIdx.x), work, static_cast<int>(gridDim.x)};
}

// Whether `hidden` goes from kernel to kernel as digits: where a row tile is a group.
template <typename Product>
constexpr bool kDigits = requires { requires Product::kGroup == kTile; };

// Work is (pair, row tile). Even warps do gate_proj, odd ones up_proj, each its share of the
// columns. The last warp, which has no more of them than any other, adds the shares up. hidden
// [pairs, rows].
template <WeightFormat kFormat, typename Product, int kWarps, typename Pairs>
__global__ void __launch_bounds__(kWarps * 32, 1)
    gate_up_kernel(const __grid_constant__ Pairs chosen, ConstMatrix x, Matrix hidden) {
  extern __shared__ uint4 shared[];
  __shared__ float parts[2][kWarps][kTile];
  __shared__ Source sources[2][kMostPairs];
  auto* rings = reinterpret_cast<std::byte*>(shared);
  std::byte* staged = rings + kWarps * kRingBytes;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int pairs = static_cast<int>(hidden.rows);
  const int rows = static_cast<int>(hidden.cols);
  const int cols = static_cast<int>(x.cols);
  const int tiles = (rows + kTile - 1) / kTile;
  // What is read first of all goes to the L2 cache meanwhile, each block's part of it.
  const auto prefetch = [&](const void* from, int bytes) {
    const int at = (thread * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x)) * 128;
    if (at < bytes) prefetch_line(static_cast<const std::byte*>(from) + at);
  };
  prefetch(chosen.table, chosen.experts * static_cast<int>(sizeof(ExpertView)));
  prefetch(x.data, cols * static_cast<int>(sizeof(float)));
  if (thread == 0) prefetch_line(chosen.used);
  begin_kernel();
  for (int i = thread; i < 2 * pairs; i += kWarps * 32) {
    sources[i % 2][i / 2] = source_of<Product>(
        chosen, i / 2, i % 2 == 0 ? &ExpertView::gate_proj : &ExpertView::up_proj);
  }
  __syncthreads();
  int staged_token = -1;
  int turn = 0;
  stream_tiles<kFormat, Product, kRing>(
      share_of(tiles * pairs), warp / 2, kWarps / 2,
      {shared_address(staged), pieces_of<kFormat>(cols)}, 1,
      shared_address(rings + warp * kRingBytes),
      [&](int i) {
        const Source& source = sources[warp % 2][i / tiles];
        return Rows<kFormat>(source.data, source.scales, rows, cols, i % tiles * kTile);
      },
      [&](int i) {
        const int token = chosen.token(i / tiles);
        if (token == staged_token) return;
        if (staged_token >= 0) __syncthreads();  // the last one is used
        Product::stage(x.data + token * x.stride, cols, staged, thread, kWarps * 32);
        staged_token = token;
        __syncthreads();
      },
      [&](int i, const Product& product) {
        float sums[4];
        product.finish(sums);
        float(*set)[kTile] = parts[turn];
        turn ^= 1;
        if (lane % 4 == 0) {  // token 0
          set[warp][lane / 4] = sums[0];
          set[warp][lane / 4 + 8] = sums[2];
        }
        __syncthreads();
        if (warp < kWarps - 1) return;
        const int pair = i / tiles;
        const int first = i % tiles * kTile;
        // Half the warp adds up gate_proj, the other half up_proj.
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; w += 2) sum += set[w + lane / kTile][lane % kTile];
        sum *= sources[lane / kTile][pair].scale;
        const float up = __shfl_down_sync(0xffffffffu, sum, kTile);
        const float value = silu(sum) * up;
        float* to = hidden.data + pair * hidden.stride;
        if constexpr (kDigits<Product>) {  // rows come in whole chunks
          Product::store(value, rows, reinterpret_cast<std::byte*>(to), first);
        } else if (lane < kTile && first + lane < rows) {
          to[first + lane] = value;
        }
      });
}

// Work is (token, `together` row tiles), each of `slots` warps: its warp k does slot k. The slots
// are summed in order, after the shared expert or what y is; a listed pair's row is written.
template <WeightFormat kFormat, typename Product, int kWarps, typename Pairs>
__global__ void __launch_bounds__(kWarps * 32, 1)
    down_kernel(const __grid_constant__ Pairs chosen, int together, ConstMatrix hidden, Matrix y) {
  extern __shared__ uint4 shared[];
  __shared__ float parts[2][kWarps][kTile];
  __shared__ Source sources[kMostPairs];
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int slots = chosen.slots;
  const int slot = warp % slots;
  const int own = warp / slots;  // of the tiles together
  const int lane = thread % 32;
  const int cols = static_cast<int>(hidden.cols);
  const int pieces = pieces_of<kFormat>(cols);
  const int rows = static_cast<int>(y.cols);
  const int tiles = (rows + kTile * together - 1) / (kTile * together);
  const int pairs = static_cast<int>(hidden.rows);
  auto* rings = reinterpret_cast<std::byte*>(shared);
  std::byte* staged = rings + slots * together * kRingBytes + slot * Product::token_bytes(pieces);
  const auto first_row = [&](int i) { return i % tiles * kTile * together; };
  if constexpr (Pairs::kListed) begin_kernel();
  for (int i = thread; i < pairs; i += static_cast<int>(blockDim.x)) {
    sources[i] = source_of<Product>(chosen, i, &ExpertView::down_proj);
    if constexpr (!Pairs::kListed) {
      if (i % slots < chosen.top_k) {
        sources[i].scale *= __ldcg(chosen.weights + i / slots * chosen.top_k + i % slots);
      }
    }
  }
  __syncthreads();
  const auto rows_of = [&](int i) {
    const Source& source = sources[i / tiles * slots + slot];
    return Rows<kFormat>(source.data, source.scales, rows, cols, first_row(i) + own * kTile);
  };
  int staged_token = -1;  // the routing is older than the kernel before, weights change never
  int turn = 0;
  stream_tiles<kFormat, Product, kRing>(
      share_of(tiles * static_cast<int>(y.rows)), 0, 1, {shared_address(staged), pieces}, 1,
      shared_address(rings + warp * kRingBytes), rows_of,
      [&](int i) {
        const int token = i / tiles;
        if (token == staged_token) return;
        if (staged_token < 0) {
          // Beyond the ring, while the kernel before ends.
          const auto first = rows_of(i);
          for (int piece = kRing; piece < pieces; ++piece) first.prefetch(piece);
          if constexpr (!Pairs::kListed) begin_kernel();
        } else {
          __syncthreads();  // the last one is used
        }
        const float* from = hidden.data + (token * slots + slot) * hidden.stride;
        if constexpr (kDigits<Product>) {
          Product::copy(reinterpret_cast<const std::byte*>(from), cols, staged, own * 32 + lane,
                        together * 32);
        } else {
          Product::stage(from, cols, staged, own * 32 + lane, together * 32);
        }
        staged_token = token;
        __syncthreads();
      },
      [&](int i, const Product& product) {
        const int token = i / tiles;
        float sums[4];
        product.finish(sums);
        float(*set)[kTile] = parts[turn];
        turn ^= 1;
        if (lane % 4 == 0) {
          const float scale = sources[token * slots + slot].scale;
          set[warp][lane / 4] = sums[0] * scale;
          set[warp][lane / 4 + 8] = sums[2] * scale;
        }
        __syncthreads();
        const int row = first_row(i) + thread;
        if (thread >= kTile * together || row >= rows) return;
        if constexpr (Pairs::kListed) {
          y.data[std::int64_t{chosen.pairs[token]} * y.stride + row] =
              set[thread / kTile][thread % kTile];
        } else {
          float* to = y.data + token * y.stride + row;
          const int first = thread / kTile * slots;
          float sum = slots > chosen.top_k ? set[first + chosen.top_k][thread % kTile] : *to;
          for (int k = 0; k < chosen.top_k; ++k) sum += set[first + k][thread % kTile];
          *to = sum;
        }
      });
}

template <WeightFormat kFormat>
std::size_t shared_bytes(std::int64_t warps, std::int64_t cols, std::int64_t tokens) {
  return static_cast<std::size_t>(
      warps * kRingBytes +
      tokens * OneToken<kFormat>::Product::token_bytes(pieces_of<kFormat>(cols)));
}

// How blocks are made up: 16 warps where the device has the shared memory.
struct Plan {
  int gate_up_warps = 0;  // 16 or 8; 0: not even that fits
  int together = 0;       // row tiles that a block of down_kernel does at a time: 2, 1 or 0
  int listed = 0;         // the same, of listed pairs: 16, 8 or 0
};

template <WeightFormat kFormat>
Plan plan_for(Device* device, std::int64_t gate_cols, std::int64_t down_cols, std::int64_t slots) {
  constexpr std::size_t kStatic = 6144;
  const auto fits = [&](std::int64_t warps, std::int64_t cols, std::int64_t tokens) {
    return warps <= kMostDownWarps && shared_bytes<kFormat>(warps, cols, tokens) + kStatic <=
                                          static_cast<std::size_t>(device->shared_bytes);
  };
  Plan plan;
  plan.gate_up_warps = fits(16, gate_cols, 1) ? 16 : fits(8, gate_cols, 1) ? 8 : 0;
  plan.together = fits(2 * slots, down_cols, slots) ? 2 : fits(slots, down_cols, slots) ? 1 : 0;
  plan.listed = fits(16, down_cols, 1) ? 16 : fits(8, down_cols, 1) ? 8 : 0;
  return plan;
}

// Two kernels over the pairs of hidden's rows.
template <WeightFormat kFormat, typename Pairs>
bool launch(Device* device, const Pairs& pairs, int gate_up_warps, int together, ConstMatrix x,
            Matrix hidden, Matrix y) {
  using Product = typename OneToken<kFormat>::Product;
  const int slots = pairs.slots;
  const auto gate_up = gate_up_warps == 16 ? gate_up_kernel<kFormat, Product, 16, Pairs>
                                           : gate_up_kernel<kFormat, Product, 8, Pairs>;
  auto down = down_kernel<kFormat, Product, 16, Pairs>;
  if constexpr (!Pairs::kListed) {
    if (slots * together > 16) down = down_kernel<kFormat, Product, kMostDownWarps, Pairs>;
  }
  const std::size_t gate_up_shared = shared_bytes<kFormat>(gate_up_warps, x.cols, 1);
  const std::size_t down_shared = shared_bytes<kFormat>(slots * together, hidden.cols, slots);
  DSFP4_TRY(cudaFuncSetAttribute(gate_up, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(gate_up_shared)));
  DSFP4_TRY(cudaFuncSetAttribute(down, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(down_shared)));
  const auto grid = [&](std::int64_t work) {
    return static_cast<unsigned>(std::min<std::int64_t>(work, device->multiprocessors));
  };
  DSFP4_TRY(ops::cuda::launch(
      device, gate_up, grid((hidden.cols + kTile - 1) / kTile * hidden.rows),
      static_cast<unsigned>(gate_up_warps * 32), gate_up_shared, pairs, x, hidden));
  DSFP4_TRY(ops::cuda::launch(
      device, down, grid((y.cols + kTile * together - 1) / (kTile * together) * y.rows),
      static_cast<unsigned>(slots * together * 32), down_shared, pairs, together, hidden, y));
  return true;
}

bool readable(const ExpertView& expert, ConstMatrix x, ConstMatrix hidden) {
  const WeightFormat format = expert.gate_proj.format;
  return format != WeightFormat::kF32 && expert.up_proj.format == format &&
         expert.down_proj.format == format && has_fours(x) && has_fours(hidden) &&
         has_pieces(expert.gate_proj) && has_pieces(expert.up_proj) && has_pieces(expert.down_proj);
}

}  // namespace

bool experts_small_fit(Device* device, const ExpertView& expert, ConstMatrix x, ConstMatrix hidden,
                       std::int64_t slots) {
  if (slots > kMostDownWarps || x.rows * slots > kMostPairs || !readable(expert, x, hidden)) {
    return false;
  }
  return for_format(expert.gate_proj.format, [&]<WeightFormat kFormat>() {
    const Plan plan =
        plan_for<kFormat>(device, expert.gate_proj.cols, expert.down_proj.cols, slots);
    return plan.gate_up_warps > 0 && plan.together > 0;
  });
}

bool experts_small(Device* device, const ExpertView* table, const ExpertView& first,
                   std::int64_t experts, DeviceRouting routing, std::int64_t top_k, ConstMatrix x,
                   Matrix hidden, Matrix y, const ExpertView* shared) {
  const auto slots = static_cast<int>(top_k);
  const Chosen chosen{table,
                      static_cast<int>(experts),
                      routing.used,
                      routing.weights,
                      slots,
                      shared == nullptr ? slots : slots + 1,
                      shared == nullptr ? first : *shared};
  hidden.rows = x.rows * chosen.slots;
  return for_format(first.gate_proj.format, [&]<WeightFormat kFormat>() {
    const Plan plan = plan_for<kFormat>(device, x.cols, hidden.cols, chosen.slots);
    return launch<kFormat>(device, chosen, plan.gate_up_warps, plan.together, x, hidden, y);
  });
}

bool tasks_small_fit(Device* device, const ExpertView& expert, ConstMatrix x, ConstMatrix hidden) {
  return readable(expert, x, hidden) &&
         for_format(expert.gate_proj.format, [&]<WeightFormat kFormat>() {
           const Plan plan =
               plan_for<kFormat>(device, expert.gate_proj.cols, expert.down_proj.cols, 1);
           return plan.gate_up_warps > 0 && plan.listed > 0;
         });
}

bool tasks_small(Device* device, const TaskList& list, const ExpertView& first, std::int64_t top_k,
                 ConstMatrix x, Matrix hidden, Matrix out) {
  return for_format(first.gate_proj.format, [&]<WeightFormat kFormat>() {
    const Plan plan = plan_for<kFormat>(device, x.cols, hidden.cols, 1);
    for (std::int64_t at = 0; at < list.pairs; at += kMostPairs) {
      hidden.rows = out.rows = std::min<std::int64_t>(list.pairs - at, kMostPairs);
      const Listed listed{list.table, static_cast<int>(list.tasks), list.used + at,
                          list.sorted + at, static_cast<int>(top_k)};
      if (!launch<kFormat>(device, listed, plan.gate_up_warps, plan.listed, x, hidden, out)) {
        return false;
      }
    }
    return true;
  });
}

}  // namespace dsfp4::ops::cuda
