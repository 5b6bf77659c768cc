// Products of many tokens on Hopper: as large.cuh, but with wgmma, which takes the weight from the
// registers where it was decoded and the tokens from shared memory, and runs while the next columns
// are decoded. A weight is decoded once for up to 144 tokens.
//
// A warpgroup does one or two tiles of 64 weight rows (kGateUp: a tile of gate_proj and the same
// rows of up_proj) and all tokens of its block. Many tokens: blocks of two warpgroups with two
// tiles each, 256 rows. Few tokens and rows: blocks of 64 rows, so that all multiprocessors read.
#include "ops/cuda/decode.cuh"
#include "ops/cuda/hopper.cuh"
#include "ops/cuda/kernels.h"
#include "ops/cuda/large.cuh"

namespace dsfp4::ops::cuda {
namespace {

template <WeightFormat kFormat, int kTokenTile, int kWarpgroups, int kRowTiles>
struct WideShape {
  using W = Words<kFormat>;
  static constexpr int kTokens = kTokenTile;
  static constexpr int kGroups = kWarpgroups;
  static constexpr int kTiles = kRowTiles;  // of a warpgroup
  static constexpr int kThreads = kGroups * 128;
  static constexpr int kBlockRows = kGroups * kTiles * 64;
  static constexpr int kUnits = W::kChunk / 8;  // of 16 bytes, a token
  static constexpr int kTokenBytes = kTokens * kUnits * 16;
  static constexpr int kRawBytes = kBlockRows * 64;
  static constexpr int kStageBytes = kTokenBytes + kRawBytes;  // multiples of 1 KB
  /// Blocks of a multiprocessor that registers and shared memory allow; a third small block is
  /// worth more than a fourth stage.
  static constexpr int kResident = kTokens * kTiles > 64    ? 1
                                   : kGroups* kTiles > 1    ? 2
                                   : kStageBytes > 16 << 10 ? 3
                                                            : 4;
  static constexpr int kStages = kResident == 3 ? 3 : 4;
  /// Scales of a row come for kSpan chunks at once: 32 bytes, NVFP4. By chunks, 8 bytes, they would
  /// cost as much as the weights.
  static constexpr int kSpan = 4;
  static constexpr int kScaleUnits = kSpan * W::kScales / 16;  // of 16 bytes, a row
  static constexpr int kSpanBytes = kBlockRows * kScaleUnits * 16;
  static constexpr int kBytes = kStages * kStageBytes + 2 * kSpanBytes + kTokens * 4;
};

template <WeightFormat kFormat, Large kWhat, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kResident)
    hopper_kernel(const LargeArguments a) {
#if DSFP4_ON_HOPPER
  using W = Words<kFormat>;
  constexpr int kTokens = Shape::kTokens;
  constexpr int kTiles = Shape::kTiles;
  constexpr int kThreads = Shape::kThreads;
  constexpr int kBlockRows = Shape::kBlockRows;
  constexpr int kAtom = Shape::kUnits < 8 ? Shape::kUnits : 8;  // units swizzled together
  constexpr bool kPairs = kWhat == Large::kGateUp;
  extern __shared__ __align__(1024) std::byte shared[];
  std::byte* const spans = shared + Shape::kStages * Shape::kStageBytes;
  auto* const out_row = reinterpret_cast<std::int32_t*>(spans + 2 * Shape::kSpanBytes);

  const int tid = static_cast<int>(threadIdx.x);
  std::int64_t row_block = blockIdx.x;
  int expert = 0;
  int count = 0;
  std::int64_t first = 0;  // token, or place in a.sorted
  if constexpr (kWhat == Large::kDense) {
    // Blocks that run together share some tiles of tokens and of weights, so that both are found
    // in the L2 cache.
    constexpr std::int64_t kTogether = 16;
    const std::int64_t id = std::int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
    const std::int64_t group = id / (gridDim.x * kTogether);
    const std::int64_t in = id - group * gridDim.x * kTogether;
    const std::int64_t size = min(kTogether, gridDim.y - group * kTogether);
    row_block = in / size;
    first = (group * kTogether + in % size) * kTokens;
    count = static_cast<int>(min(a.tokens - first, std::int64_t{kTokens}));
  } else {
    if (static_cast<int>(blockIdx.y) >= *a.task_count) return;
    const LargeTask task = a.tasks[blockIdx.y];
    expert = task.expert;
    count = task.count;
    first = task.first;
  }
  // Beyond the last token: that one once more, never written.
  const auto out_of = [&](int token) {
    const std::int64_t at = first + min(token, count - 1);
    return kWhat == Large::kDense ? static_cast<std::int32_t>(at) : a.sorted[at];
  };
  if (tid < kTokens) out_row[tid] = out_of(tid);

  const WeightView& first_weight = kWhat == Large::kDense  ? a.weight
                                   : kWhat == Large::kDown ? a.table[expert].down_proj
                                                           : a.table[expert].gate_proj;
  const WeightView& second_weight = kPairs ? a.table[expert].up_proj : first_weight;
  const int chunks = static_cast<int>(a.cols / W::kChunk);
  const auto raw_stride = static_cast<std::uint64_t>(a.cols / W::kLane * 16);
  const auto scale_stride = static_cast<std::uint64_t>(a.cols / W::kChunk * W::kScales);
  // Row `r` of the block's: tile r / 64 % kTiles of its warpgroup.
  const auto weight_row = [&](int r) {
    const std::int64_t at =
        kPairs ? row_block * (kBlockRows / 2) + r / 128 * 64 + r % 64 : row_block * kBlockRows + r;
    return static_cast<std::uint64_t>(min(at, a.rows - 1));
  };

  // Copies of this thread: unit tid % 4 of some rows, the scales of row tid, and unit tid % kUnits
  // of some tokens.
  constexpr int kRowStep = kThreads / 4;
  const std::byte* raw_from[kBlockRows / kRowStep];
#pragma unroll
  for (int j = 0; j < kBlockRows / kRowStep; ++j) {
    const int r = tid / 4 + kRowStep * j;
    const std::byte* data = kPairs && r / 64 % 2 == 1 ? second_weight.data : first_weight.data;
    raw_from[j] = data + weight_row(r) * raw_stride + tid % 4 * 16;
  }
  const std::byte* scales_from =
      (kPairs && tid / 64 % 2 == 1 ? second_weight.scales : first_weight.scales) +
      weight_row(tid) * scale_stride;
  const bool whole_units = (reinterpret_cast<std::uint64_t>(first_weight.scales) |
                            reinterpret_cast<std::uint64_t>(second_weight.scales) | scale_stride) %
                               16 ==
                           0;
  constexpr int kTokenStep = kThreads / Shape::kUnits;
  constexpr int kTokenCopies = (kTokens + kTokenStep - 1) / kTokenStep;
  const int unit = tid % Shape::kUnits;
  const int token0 = tid / Shape::kUnits;
  const std::byte* token_from[kTokenCopies];
#pragma unroll
  for (int j = 0; j < kTokenCopies; ++j) {
    const std::int32_t row = out_of(token0 + j * kTokenStep);
    token_from[j] = reinterpret_cast<const std::byte*>(a.x) +
                    (kPairs ? row / a.top_k : row) * a.x_stride * 2 + unit * 16;
  }
  const auto token_to = [&](int token) {
    return unit / kAtom * (kTokens * kAtom * 16) + token * kAtom * 16 +
           swizzled<kAtom>(token, unit % kAtom) * 16;
  };

  [[maybe_unused]] const auto load_span = [&](int span) {
    constexpr int kRowBytes = Shape::kScaleUnits * 16;
    const std::byte* from = scales_from + std::int64_t{span} * kRowBytes;
    const int left = static_cast<int>(scale_stride) - span * kRowBytes;
    std::byte* to = spans + span % 2 * Shape::kSpanBytes + tid * 16;
#pragma unroll
    for (int u = 0; u < Shape::kScaleUnits; ++u) {
      if (whole_units) {
        if (u * 16 < left) copy_of_row(to + u * kBlockRows * 16, from + u * 16);
      } else {
#pragma unroll
        for (int i = 0; i < 16; i += W::kScales) {
          if (u * 16 + i < left) {
            copy_async<W::kScales>(to + u * kBlockRows * 16 + i, from + u * 16 + i);
          }
        }
      }
    }
  };
  const auto load_stage = [&](int chunk) {
    std::byte* stage = shared + chunk % Shape::kStages * Shape::kStageBytes;
#pragma unroll
    for (int j = 0; j < kTokenCopies; ++j) {
      const int token = token0 + j * kTokenStep;
      if (token < count) {
        copy_async<16>(stage + token_to(token),
                       token_from[j] + std::int64_t{chunk} * W::kChunk * 2);
      }
    }
    std::byte* raw = stage + Shape::kTokenBytes;
#pragma unroll
    for (int j = 0; j < kBlockRows / kRowStep; ++j) {
      copy_of_row(raw + (j * kThreads + tid) * 16, raw_from[j] + std::int64_t{chunk} * 64);
    }
    if constexpr (W::kScales > 0) {
      if (chunk % Shape::kSpan == 0 && tid < kBlockRows) load_span(chunk / Shape::kSpan);
    }
  };

  const int group = tid / 128;
  const int lane = tid % 32;
  const int quad = lane % 4;
  const int warp_row = group * kTiles * 64 + tid / 32 % 4 * 16 + lane / 4;  // of its first tile
  float sums[kTiles][kTokens / 2];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) sums[m][i] = 0.0f;
  }
  float tile_scale[kTiles];  // FP8: what the sums must be multiplied with
#pragma unroll
  for (int m = 0; m < kTiles; ++m) tile_scale[m] = 1.0f;

#pragma unroll
  for (int j = 0; j < kTokenCopies; ++j) {
    // No sum of an absent token is written; but products of zeros take less power than of whatever
    // lay there, and power is what limits the clock here.
    const int token = token0 + j * kTokenStep;
    if (token < count || token >= kTokens) continue;
#pragma unroll
    for (int s = 0; s < Shape::kStages; ++s) {
      *reinterpret_cast<uint4*>(shared + s * Shape::kStageBytes + token_to(token)) = uint4{};
    }
  }

  // A stage is filled again two chunks after it was used: by then its products have ended.
  constexpr int kAhead = Shape::kStages - 2;
#pragma unroll
  for (int s = 0; s < kAhead; ++s) {
    if (s < chunks) load_stage(s);
    commit_copies();
  }
  // All chunks, with products of kCount tokens: no fewer than the task has.
  const auto multiply_chunks = [&]<int kCount>() {
    unsigned left[2][kTiles][4];
    for (int chunk = 0; chunk < chunks; ++chunk) {
      wait_copies<kAhead - 1>();
      publish_to_products();
      __syncthreads();
      if (chunk + kAhead < chunks) load_stage(chunk + kAhead);
      commit_copies();

      if constexpr (kFormat == WeightFormat::kFp8Block) {
        // Sums are kept in units of the current tile's multiplier.
        constexpr int kTile = static_cast<int>(::dsfp4::format::kFp8Tile);
        if (chunk % (kTile / W::kChunk) == 0) {
          wait_products<0>();
          const std::int64_t across = (a.cols + kTile - 1) / kTile;
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
            const auto* scales = reinterpret_cast<const float*>(
                (m == 0 ? first_weight.scales : second_weight.scales));
            const std::int64_t row = weight_row(group * kTiles * 64 + m * 64) / kTile;
            float scale = __ldg(scales + row * across + chunk / (kTile / W::kChunk));
            if (fabsf(scale) < 1e-20f) scale = 1e-20f;
            const float change = tile_scale[m] / scale;
            tile_scale[m] = scale;
#pragma unroll
            for (int i = 0; i < kTokens / 2; ++i) sums[m][i] *= change;
          }
        }
      }

      // BF16 needs no decoding: the last product may still read the very registers loaded next.
      if constexpr (kFormat == WeightFormat::kBF16) wait_products<0>();
      const std::byte* stage = shared + chunk % Shape::kStages * Shape::kStageBytes;
      const auto* raw = reinterpret_cast<const uint4*>(stage + Shape::kTokenBytes);
      const std::byte* scale_bytes = spans + chunk / Shape::kSpan % 2 * Shape::kSpanBytes +
                                     chunk % Shape::kSpan * W::kScales / 16 * (kBlockRows * 16) +
                                     chunk % Shape::kSpan * W::kScales % 16;
      uint4 low[kTiles];
      uint4 high[kTiles];
      unsigned scales[kTiles][2][2] = {};  // of rows lane / 4 and 8 more, of a lane's two halves
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const int r = warp_row + m * 64;
        low[m] = raw[r * 4 + quad];
        high[m] = raw[(r + 8) * 4 + quad];
        const std::byte* of_row = scale_bytes + r * 16;
        const std::byte* of_other = of_row + 8 * 16;
        if constexpr (kFormat == WeightFormat::kNvfp4) {
          const unsigned two = reinterpret_cast<const unsigned short*>(of_row)[quad];
          const unsigned more = reinterpret_cast<const unsigned short*>(of_other)[quad];
          nvfp4_scales(two | more << 16, scales[m]);
        } else if constexpr (kFormat == WeightFormat::kMxfp4) {
          scales[m][0][0] = scales[m][0][1] = mxfp4_scale(static_cast<unsigned>(of_row[quad]));
          scales[m][1][0] = scales[m][1][1] = mxfp4_scale(static_cast<unsigned>(of_other[quad]));
        }
      }
      constexpr int kSteps = W::kSteps;
      const std::uint64_t all_tokens = tile_descriptor<kAtom * 16>(stage);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        constexpr int kAtomSteps = kAtom / 2;
        const std::uint64_t tokens = further(
            all_tokens, step / kAtomSteps * (kTokens * kAtom * 16) + step % kAtomSteps * 32);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          decode_step<kFormat>(low[m], high[m], step, scales[m][0][step / (kSteps / 2)],
                               scales[m][1][step / (kSteps / 2)], left[step % 2][m]);
        }
        order_registers();
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          multiply_tokens<kCount>(reinterpret_cast<float(&)[kCount / 2]>(sums[m]),
                                  left[step % 2][m], tokens);
        }
        commit_products();
        wait_products<1>();
      }
    }
    wait_products<0>();
  };
  if constexpr (kTokens == kHopperTask) {
    if (count <= 64) {
      multiply_chunks.template operator()<64>();
    } else if (count <= 128) {
      multiply_chunks.template operator()<128>();
    } else {
      multiply_chunks.template operator()<kTokens>();
    }
  } else if constexpr (kTokens == 32 && kWhat != Large::kDense) {
    if (count <= 16) {
      multiply_chunks.template operator()<16>();
    } else {
      multiply_chunks.template operator()<kTokens>();
    }
  } else {
    multiply_chunks.template operator()<kTokens>();
  }

  // sums[4n + i] belongs to row 8 * (i / 2) + lane / 4 of the warp and token 8n + 2 quad + i % 2.
#pragma unroll
  for (int m = 0; m < (kPairs ? 1 : kTiles); ++m) {
    const int r = warp_row + m * 64;
    const std::int64_t base =
        kPairs ? row_block * (kBlockRows / 2) + r / 128 * 64 + r % 64 : row_block * kBlockRows + r;
    const float scale = word_epilogue(first_weight) * tile_scale[m];
    const float up_scale = kPairs ? word_epilogue(second_weight) * tile_scale[kTiles - 1] : 1.0f;
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int token = i / 4 * 8 + quad * 2 + i % 2;
      const std::int64_t row = base + i % 4 / 2 * 8;
      if (token >= count || row >= a.rows) continue;
      float value = sums[m][i] * scale;
      if constexpr (kPairs) value = silu(value) * (sums[kTiles - 1][i] * up_scale);
      const std::int64_t at = out_row[token] * a.y.stride + row;
      if (kWhat == Large::kDense && a.rounded != nullptr) {
        a.rounded[at] = __float2bfloat16_rn(value);
      } else {
        a.y.data[at] = value;
      }
    }
  }
#endif
}

template <WeightFormat kFormat, Large kWhat, int kTokens, int kGroups, int kTiles>
bool launch_shape(Device* device, const LargeArguments& arguments, std::int64_t token_blocks) {
  using Shape = WideShape<kFormat, kTokens, kGroups, kTiles>;
  const auto kernel = hopper_kernel<kFormat, kWhat, Shape>;
  constexpr int kRows = kWhat == Large::kGateUp ? Shape::kBlockRows / 2 : Shape::kBlockRows;
  DSFP4_TRY(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kBytes));
  kernel<<<dim3(blocks_for(arguments.rows, kRows), static_cast<unsigned>(token_blocks)),
           Shape::kThreads, Shape::kBytes, device->stream>>>(arguments);
  DSFP4_LAUNCHED("hopper_kernel");
  return true;
}

template <WeightFormat kFormat>
bool dense(Device* device, const LargeArguments& arguments) {
  const auto blocks = [&](int tile) { return (arguments.tokens + tile - 1) / tile; };
  if (arguments.rows / 256 * blocks(128) >= device->multiprocessors) {
    return launch_shape<kFormat, Large::kDense, 128, 2, 2>(device, arguments, blocks(128));
  }
  if (arguments.tokens <= 16) {
    return launch_shape<kFormat, Large::kDense, 16, 1, 1>(device, arguments, blocks(16));
  }
  if (arguments.tokens <= 32) {
    return launch_shape<kFormat, Large::kDense, 32, 1, 1>(device, arguments, blocks(32));
  }
  return launch_shape<kFormat, Large::kDense, 64, 1, 1>(device, arguments, blocks(64));
}

template <WeightFormat kFormat, Large kWhat>
bool tasks_of(Device* device, const LargeArguments& arguments, int tile, std::int64_t tasks) {
  if (tile == 32) return launch_shape<kFormat, kWhat, 32, 2, 2>(device, arguments, tasks);
  if (tile == 64) return launch_shape<kFormat, kWhat, 64, 2, 2>(device, arguments, tasks);
  return launch_shape<kFormat, kWhat, kHopperTask, 2, 2>(device, arguments, tasks);
}

}  // namespace

bool dense_hopper(Device* device, const LargeArguments& arguments) {
  return for_format(arguments.weight.format,
                    [&]<WeightFormat kFormat>() { return dense<kFormat>(device, arguments); });
}

bool tasks_hopper(Device* device, WeightFormat format, Large what, const LargeArguments& arguments,
                  int tile, std::int64_t tasks) {
  return for_format(format, [&]<WeightFormat kFormat>() {
    return what == Large::kDown ? tasks_of<kFormat, Large::kDown>(device, arguments, tile, tasks)
                                : tasks_of<kFormat, Large::kGateUp>(device, arguments, tile, tasks);
  });
}

}  // namespace dsfp4::ops::cuda
