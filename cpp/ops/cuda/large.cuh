// Products of many tokens on tensor cores: tiles of weights, as stored, and of activations pass
// through shared memory in a pipeline of cp.async stages; weights are decoded to BF16 in registers
// on the way to mma.sync, once for every 64 tokens. FP32 sums.
//
// A block is 4 warps; a warp does kTilesM x 16 weight rows and up to 64 tokens. Activations come as
// BF16 rows in mma order (activation_place()), made by prepare_rows().
#pragma once

#include "ops/cuda/copies.cuh"
#include "ops/cuda/task_list.cuh"
#include "ops/cuda/words.cuh"

namespace dsfp4::ops::cuda {

constexpr int kLargeTokens = 64;
/// Of a task at most, with wgmma: 4096 tokens and 8 of 256 experts at random are 128 an expert, 144
/// or fewer for 13 of 14; and four stages of 144 fit into shared memory.
constexpr int kHopperTask = 144;
constexpr int kLargeWarps = 4;

/// Where column `k` lies in a prepared row: each product's 16 columns beside each other, first the
/// quad's first pairs, then its second ones, as ldmatrix hands them out.
template <WeightFormat kFormat>
__host__ __device__ constexpr std::int64_t activation_place(std::int64_t k) {
  using W = Words<kFormat>;
  const int in = static_cast<int>(k % W::kChunk);
  const int place = decoded_place<kFormat>(in % W::kLane);
  return k - in + place / 4 * 16 + place % 4 / 2 * 8 + in / W::kLane * 2 + place % 2;
}

/// What the rows of a block are.
enum class Large {
  kDense,   // y = x W^T
  kGateUp,  // hidden[pair] = silu(gate x) * up x, x = row pair / top_k
  kDown,    // routed[pair] = down hidden[pair]
};

struct LargeArguments {
  WeightView weight;        // kDense
  const ExpertView* table;  // else
  const LargeTask* tasks;
  const std::int32_t* task_count;
  const std::int32_t* sorted;
  int top_k;
  const __nv_bfloat16* x;  // prepared, x_stride values a row
  std::int64_t x_stride;
  std::int64_t tokens;  // kDense
  std::int64_t rows;    // of the weight
  std::int64_t cols;
  Matrix y;
  __nv_bfloat16* rounded;  // kDense: if not null, the output as BF16, in place of y.data
};

/// large_hopper.cu: the same for GPUs with wgmma (Device::wgmma). kDense; and kGateUp and kDown
/// with up to `tasks` tasks of `tile` = 32, 64 or kHopperTask tokens.
bool dense_hopper(Device* device, const LargeArguments& arguments);
bool tasks_hopper(Device* device, WeightFormat format, Large what, const LargeArguments& arguments,
                  int tile, std::int64_t tasks);

/// Stages of the pipeline; `shallow`: for GPUs whose blocks have 99 KB of shared memory.
template <WeightFormat kFormat>
constexpr int large_stages(bool shallow) {
  if (kFormat == WeightFormat::kNvfp4 || kFormat == WeightFormat::kMxfp4) return shallow ? 2 : 3;
  return 4;
}

template <WeightFormat kFormat, int kTilesM, int kDepth = large_stages<kFormat>(false)>
struct LargeShape {
  using W = Words<kFormat>;
  static constexpr int kStages = kDepth;
  static constexpr int kRows = kLargeWarps * kTilesM * 16;  // weight rows of a block
  static constexpr int kUnits = W::kChunk / 8;              // of 16 bytes, a token
  static constexpr int kRawBytes = kRows * 64;
  static constexpr int kScaleBytes = kRows * W::kScales;
  static constexpr int kTokenBytes = kLargeTokens * W::kChunk * 2;
  static constexpr int kStageBytes = kRawBytes + kScaleBytes + kTokenBytes;
  static constexpr int kBytes = kStages * kStageBytes;
};

__device__ __forceinline__ void load_matrices(unsigned out[4], const void* from) {
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(from));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared));
}

/// Unit of 16 bytes in a token's row of a tile, moved so that 8 tokens' lie in different banks.
template <int kUnits>
__device__ __forceinline__ int swizzled(int token, int unit) {
  return kUnits >= 8 ? unit ^ (token & 7) : unit ^ ((token >> 1) & 3);
}

/// The rows of a block and where they come from.
template <Large kWhat, int kTilesM>
struct LargeRows {
  /// The weight and row of the block's row `r`; beyond the last row, the last one.
  static __device__ __forceinline__ const WeightView& weight(const LargeArguments& a, int expert,
                                                             int r) {
    if constexpr (kWhat == Large::kDense) return a.weight;
    if constexpr (kWhat == Large::kDown) return a.table[expert].down_proj;
    return r / 16 % kTilesM < kTilesM / 2 ? a.table[expert].gate_proj : a.table[expert].up_proj;
  }
  static __device__ __forceinline__ std::int64_t row(const LargeArguments& a, std::int64_t block,
                                                     int r) {
    std::int64_t at;
    if constexpr (kWhat == Large::kGateUp) {
      constexpr int kHalf = kTilesM / 2 * 16;  // a warp's rows of gate_proj, then of up_proj
      at = block * (kLargeWarps * kHalf) + r / (2 * kHalf) * kHalf + r % kHalf;
    } else {
      at = block * (kLargeWarps * kTilesM * 16) + r;
    }
    return min(at, a.rows - 1);
  }
};

/// The weight's operand of product `step` of a chunk, from a lane's words of two rows.
template <WeightFormat kFormat>
__device__ __forceinline__ void decode_step(const uint4& low, const uint4& high, int step,
                                            unsigned scale_low, unsigned scale_high,
                                            unsigned a[4]) {
  const unsigned lw[4] = {low.x, low.y, low.z, low.w};
  const unsigned hw[4] = {high.x, high.y, high.z, high.w};
  if constexpr (kFormat == WeightFormat::kBF16) {
    a[0] = lw[2 * step];
    a[1] = hw[2 * step];
    a[2] = lw[2 * step + 1];
    a[3] = hw[2 * step + 1];
  } else {
    unsigned l[2];
    unsigned h[2];
    if constexpr (kFormat == WeightFormat::kFp8Block) {
      decode_fp8(lw[step], l);
      decode_fp8(hw[step], h);
      a[0] = l[0];
      a[1] = h[0];
      a[2] = l[1];
      a[3] = h[1];
    } else {
      decode_fp4(lw[step / 2], step % 2, l);
      decode_fp4(hw[step / 2], step % 2, h);
      a[0] = times_bf16x2(l[0], scale_low);
      a[1] = times_bf16x2(h[0], scale_high);
      a[2] = times_bf16x2(l[1], scale_low);
      a[3] = times_bf16x2(h[1], scale_high);
    }
  }
}

template <WeightFormat kFormat, int kTilesM, Large kWhat, int kDepth>
__global__ void __launch_bounds__(kLargeWarps * 32, kTilesM == 1 ? 3 : 2)
    large_kernel(const LargeArguments a) {
  using W = Words<kFormat>;
  using Shape = LargeShape<kFormat, kTilesM, kDepth>;
  using Rows = LargeRows<kWhat, kTilesM>;
  constexpr int kTilesN = kLargeTokens / 8;
  constexpr int kThreads = kLargeWarps * 32;
  extern __shared__ uint4 shared_units[];
  auto* shared = reinterpret_cast<std::byte*>(shared_units);
  __shared__ std::int32_t out_row[kLargeTokens];
  __shared__ std::uint64_t in_offset[kLargeTokens];  // bytes

  int expert = 0;
  int count = 0;
  const int tid = static_cast<int>(threadIdx.x);
  std::int64_t row_block = blockIdx.x;
  if constexpr (kWhat == Large::kDense) {
    // Blocks that run together share some tiles of tokens and of weights, so that both are found
    // in the L2 cache.
    constexpr std::int64_t kTogether = 16;
    const std::int64_t id = std::int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
    const std::int64_t group = id / (gridDim.x * kTogether);
    const std::int64_t in = id - group * gridDim.x * kTogether;
    const std::int64_t size = min(kTogether, gridDim.y - group * kTogether);
    row_block = in / size;
    const std::int64_t first = (group * kTogether + in % size) * kLargeTokens;
    count = static_cast<int>(min(a.tokens - first, std::int64_t{kLargeTokens}));
    if (tid < kLargeTokens) {
      out_row[tid] = static_cast<std::int32_t>(first) + min(tid, count - 1);
      in_offset[tid] = static_cast<std::uint64_t>(out_row[tid]) * a.x_stride * 2;
    }
  } else {
    if (static_cast<int>(blockIdx.y) >= *a.task_count) return;
    const LargeTask task = a.tasks[blockIdx.y];
    expert = task.expert;
    count = task.count;
    if (tid < kLargeTokens) {
      const std::int32_t pair = a.sorted[task.first + min(tid, count - 1)];
      out_row[tid] = pair;
      in_offset[tid] = static_cast<std::uint64_t>(kWhat == Large::kGateUp ? pair / a.top_k : pair) *
                       a.x_stride * 2;
    }
  }
  __syncthreads();
  const int tiles = (count + 7) / 8;

  const int warp = tid / 32;
  const int lane = tid % 32;
  const int quad = lane % 4;
  const int chunks = static_cast<int>(a.cols / W::kChunk);
  const std::int64_t row_bytes = a.cols / W::kLane * 16;

  // Where this thread's copies come from. Weight rows: slab j has 32 rows, of which this thread
  // copies unit tid % 4 of row tid / 4; a slab of kGateUp is of gate_proj or of up_proj.
  constexpr int kSlabs = Shape::kRows / 32;
  constexpr bool kPairs = kWhat == Large::kGateUp;
  static_assert(!kPairs || kTilesM == 4);
  const WeightView& first_weight = Rows::weight(a, expert, 0);
  const WeightView& second_weight = kPairs ? a.table[expert].up_proj : first_weight;
  const std::byte* const data[2] = {first_weight.data + tid % 4 * 16,
                                    second_weight.data + tid % 4 * 16};
  const std::byte* const scales[2] = {first_weight.scales, second_weight.scales};
  const auto last_row = static_cast<std::uint32_t>(a.rows - 1);
  const auto base_row =
      static_cast<std::uint32_t>(row_block * (kPairs ? Shape::kRows / 2 : Shape::kRows));
  const auto raw_stride = static_cast<std::uint32_t>(row_bytes);
  const auto scale_stride = static_cast<std::uint32_t>(a.cols / W::kChunk * W::kScales);
  // Tokens: copy j is of token tid / kUnits + j * kTokenStep.
  constexpr int kTokenStep = kThreads / Shape::kUnits;
  const int token0 = tid / Shape::kUnits;
  const int token_to =
      token0 * Shape::kUnits * 16 + swizzled<Shape::kUnits>(token0, tid % Shape::kUnits) * 16;
  const auto* token_from = reinterpret_cast<const std::byte*>(a.x) + tid % Shape::kUnits * 16;

  const auto load_stage = [&](int chunk) {
    std::byte* stage = shared + chunk % Shape::kStages * Shape::kStageBytes;
#pragma unroll
    for (int j = 0; j < kSlabs; ++j) {
      const std::uint32_t row =
          min(base_row + (kPairs ? j / 2 : j) * 32 + static_cast<std::uint32_t>(tid) / 4, last_row);
      copy_async<16>(stage + j * 2048 + tid * 16,
                     data[kPairs ? j % 2 : 0] + std::uint64_t{row} * raw_stride + chunk * 64);
    }
    if constexpr (W::kScales > 0) {
#pragma unroll
      for (int j = 0; j < (Shape::kRows + kThreads - 1) / kThreads; ++j) {
        const int r = tid + j * kThreads;
        if (r >= Shape::kRows) break;
        const std::uint32_t in = kPairs ? r / 64 * 32 + r % 32 : r;
        const std::uint32_t row = min(base_row + in, last_row);
        copy_async<W::kScales>(stage + Shape::kRawBytes + r * W::kScales,
                               scales[kPairs ? r / 32 % 2 : 0] + std::uint64_t{row} * scale_stride +
                                   chunk * W::kScales);
      }
    }
    std::byte* tokens = stage + Shape::kRawBytes + Shape::kScaleBytes + token_to;
#pragma unroll
    for (int j = 0; j < kLargeTokens / kTokenStep; ++j) {
      if (token0 + j * kTokenStep < tiles * 8) {
        copy_async<16>(tokens + j * kTokenStep * Shape::kUnits * 16,
                       token_from + in_offset[token0 + j * kTokenStep] + chunk * W::kChunk * 2);
      }
    }
  };

  float sums[kTilesM][kTilesN][4];
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
    }
  }
  float tile_scale[kTilesM];  // FP8: what the sums must be multiplied with
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) tile_scale[m] = 1.0f;

#pragma unroll
  for (int s = 0; s < Shape::kStages - 1; ++s) {
    if (s < chunks) load_stage(s);
    commit_copies();
  }
  for (int chunk = 0; chunk < chunks; ++chunk) {
    wait_copies<Shape::kStages - 2>();
    __syncthreads();
    if (chunk + Shape::kStages - 1 < chunks) load_stage(chunk + Shape::kStages - 1);
    commit_copies();

    const std::byte* stage = shared + chunk % Shape::kStages * Shape::kStageBytes;
    const std::byte* tokens = stage + Shape::kRawBytes + Shape::kScaleBytes;
    uint4 low[kTilesM];
    uint4 high[kTilesM];
    unsigned low_scales[kTilesM];
    unsigned high_scales[kTilesM];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      const int r = warp * kTilesM * 16 + m * 16 + lane / 4;
      const auto* raw = reinterpret_cast<const uint4*>(stage);
      low[m] = raw[r * 4 + quad];
      high[m] = raw[(r + 8) * 4 + quad];
      if constexpr (kFormat == WeightFormat::kNvfp4) {
        const auto* scales = reinterpret_cast<const unsigned short*>(stage + Shape::kRawBytes);
        low_scales[m] = scales[r * 4 + quad];
        high_scales[m] = scales[(r + 8) * 4 + quad];
      } else if constexpr (kFormat == WeightFormat::kMxfp4) {
        const auto* scales = reinterpret_cast<const unsigned char*>(stage + Shape::kRawBytes);
        low_scales[m] = mxfp4_scale(scales[r * 4 + quad]);
        high_scales[m] = mxfp4_scale(scales[(r + 8) * 4 + quad]);
      }
    }
    if constexpr (kFormat == WeightFormat::kFp8Block) {
      // Sums are kept in units of the current tile's multiplier.
      constexpr int kTile = static_cast<int>(::dsfp4::format::kFp8Tile);
      if (chunk % (kTile / W::kChunk) == 0) {
        const std::int64_t across = (a.cols + kTile - 1) / kTile;
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          const int r = warp * kTilesM * 16 + m * 16;
          const auto* scales = reinterpret_cast<const float*>(Rows::weight(a, expert, r).scales);
          float scale = __ldg(scales + Rows::row(a, row_block, r) / kTile * across +
                              chunk / (kTile / W::kChunk));
          if (fabsf(scale) < 1e-20f) scale = 1e-20f;
          const float change = tile_scale[m] / scale;
          tile_scale[m] = scale;
          if (chunk > 0 && change != 1.0f) {
#pragma unroll
            for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
              for (int i = 0; i < 4; ++i) sums[m][n][i] *= change;
            }
          }
        }
      }
    }
    unsigned scale_low[kTilesM] = {};
    unsigned scale_high[kTilesM] = {};
#pragma unroll
    for (int step = 0; step < W::kSteps; ++step) {
      if (kFormat == WeightFormat::kNvfp4 && step % (W::kSteps / 2) == 0) {
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {  // a lane's words hold two groups
          const int shift = step == 0 ? 0 : 8;
          scale_low[m] = nvfp4_scale((low_scales[m] >> shift) & 0xffu);
          scale_high[m] = nvfp4_scale((high_scales[m] >> shift) & 0xffu);
        }
      } else if (kFormat == WeightFormat::kMxfp4 && step == 0) {
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          scale_low[m] = low_scales[m];
          scale_high[m] = high_scales[m];
        }
      }
      unsigned b[kTilesN][2];
#pragma unroll
      for (int n = 0; n < kTilesN; n += 2) {
        if (n < tiles) {
          // The second tile may lie beyond the tokens: then what is read is not used.
          const int token = (n + lane / 16) * 8 + lane % 8;
          const int unit = step * 2 + lane / 8 % 2;
          unsigned four[4];
          load_matrices(
              four, tokens + (token * Shape::kUnits + swizzled<Shape::kUnits>(token, unit)) * 16);
          b[n][0] = four[0];
          b[n][1] = four[1];
          b[n + 1][0] = four[2];
          b[n + 1][1] = four[3];
        }
      }
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        unsigned left[4];
        decode_step<kFormat>(low[m], high[m], step, scale_low[m], scale_high[m], left);
#pragma unroll
        for (int n = 0; n < kTilesN; ++n) {
          if (n < tiles) multiply(sums[m][n], left, b[n][0], b[n][1]);
        }
      }
    }
  }

  // Write: sums[i] belongs to row 8 * (i / 2) + lane / 4 and token 2 * quad + i % 2.
#pragma unroll
  for (int m = 0; m < (kWhat == Large::kGateUp ? kTilesM / 2 : kTilesM); ++m) {
    const int r = warp * kTilesM * 16 + m * 16;
    std::int64_t base;
    if constexpr (kWhat == Large::kGateUp) {
      base = (row_block * kLargeWarps + warp) * (kTilesM / 2 * 16) + m * 16;
    } else {
      base = row_block * Shape::kRows + r;
    }
    float scale = word_epilogue(Rows::weight(a, expert, r));
    float up_scale = 1.0f;
    if constexpr (kWhat == Large::kGateUp) {
      up_scale = word_epilogue(Rows::weight(a, expert, r + kTilesM / 2 * 16));
    }
    if constexpr (kFormat == WeightFormat::kFp8Block) {
      scale *= tile_scale[m];
      if constexpr (kWhat == Large::kGateUp) up_scale *= tile_scale[m + kTilesM / 2];
    }
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = n * 8 + quad * 2 + i % 2;
        const std::int64_t row = base + i / 2 * 8 + lane / 4;
        if (token >= count || row >= a.rows) continue;
        float value = sums[m][n][i] * scale;
        if constexpr (kWhat == Large::kGateUp) {
          value = silu(value) * (sums[m + kTilesM / 2][n][i] * up_scale);
        }
        const std::int64_t at = out_row[token] * a.y.stride + row;
        if (kWhat == Large::kDense && a.rounded != nullptr) {
          a.rounded[at] = __float2bfloat16_rn(value);
        } else {
          a.y.data[at] = value;
        }
      }
    }
  }
}

}  // namespace dsfp4::ops::cuda
