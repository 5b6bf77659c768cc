// Dense and grouped products of many tokens: launches of the kernel in large.cuh, the preparation
// of its activations, and the grouping of (token, slot) pairs by expert.
#include "ops/cuda/decode.cuh"
#include "ops/cuda/kernels.h"
#include "ops/cuda/large.cuh"
#include "ops/cuda/prepared.cuh"
#include "ops/cuda/workspaces.h"

namespace dsfp4::ops::cuda {
namespace {

constexpr int kThreads = 256;

template <WeightFormat kFormat>
__global__ void prepare_kernel(ConstMatrix x, __nv_bfloat16* out) {
  const float* from = x.data + blockIdx.y * x.stride;
  __nv_bfloat16* to = out + blockIdx.y * x.cols;
  const std::int64_t k = blockIdx.x * std::int64_t{kThreads} + threadIdx.x;
  if (k < x.cols) to[activation_place<kFormat>(k)] = __float2bfloat16_rn(from[k]);
}

// prepare_kernel() of the rows pairs[i] / per_row alone.
template <WeightFormat kFormat>
__global__ void prepare_listed_kernel(ConstMatrix x, const std::int32_t* pairs, int per_row,
                                      __nv_bfloat16* out) {
  const std::int64_t row = pairs[blockIdx.y] / per_row;
  const std::int64_t k = blockIdx.x * std::int64_t{kThreads} + threadIdx.x;
  if (k >= x.cols) return;
  out[row * x.cols + activation_place<kFormat>(k)] =
      __float2bfloat16_rn(x.data[row * x.stride + k]);
}

// One block. Counts the pairs of each expert, gives each expert a run of `sorted`, and cuts the
// runs into tasks of up to `tile` pairs. The order within a run is of no consequence: a pair's sums
// do not depend on it.
__global__ void __launch_bounds__(1024)
    group_kernel(const std::int32_t* used, int pairs, int experts, int tile, std::int32_t* sorted,
                 LargeTask* tasks, std::int32_t* task_count) {
  extern __shared__ std::int32_t counts[];  // [experts], then where each run begins
  std::int32_t* cursor = counts + experts;
  for (int e = static_cast<int>(threadIdx.x); e < experts; e += 1024) counts[e] = 0;
  __syncthreads();
  for (int p = static_cast<int>(threadIdx.x); p < pairs; p += 1024) atomicAdd(&counts[used[p]], 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    int at = 0;
    int made = 0;
    for (int e = 0; e < experts; ++e) {
      cursor[e] = at;
      for (int first = 0; first < counts[e]; first += tile) {
        tasks[made++] = {e, at + first, min(counts[e] - first, tile)};
      }
      at += counts[e];
    }
    *task_count = made;
  }
  __syncthreads();
  for (int p = static_cast<int>(threadIdx.x); p < pairs; p += 1024) {
    sorted[atomicAdd(&cursor[used[p]], 1)] = p;
  }
}

template <WeightFormat kFormat, int kTilesM, Large kWhat, int kDepth>
bool launch_at_depth(Device* device, const LargeArguments& arguments, std::int64_t row_blocks,
                     std::int64_t token_blocks) {
  using Shape = LargeShape<kFormat, kTilesM, kDepth>;
  const auto kernel = large_kernel<kFormat, kTilesM, kWhat, kDepth>;
  DSFP4_TRY(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kBytes));
  kernel<<<dim3(static_cast<unsigned>(row_blocks), static_cast<unsigned>(token_blocks)),
           kLargeWarps * 32, Shape::kBytes, device->stream>>>(arguments);
  DSFP4_LAUNCHED("large_kernel");
  return true;
}

template <WeightFormat kFormat, int kTilesM, Large kWhat>
bool launch(Device* device, const LargeArguments& arguments, std::int64_t row_blocks,
            std::int64_t token_blocks) {
  constexpr int kDeep = large_stages<kFormat>(false);
  constexpr int kShallow = large_stages<kFormat>(true);
  constexpr int kStatic = 1024;  // shared memory beside the stages
  if constexpr (kDeep != kShallow) {
    if (LargeShape<kFormat, kTilesM, kDeep>::kBytes + kStatic > device->shared_bytes) {
      return launch_at_depth<kFormat, kTilesM, kWhat, kShallow>(device, arguments, row_blocks,
                                                                token_blocks);
    }
  }
  return launch_at_depth<kFormat, kTilesM, kWhat, kDeep>(device, arguments, row_blocks,
                                                         token_blocks);
}

template <WeightFormat kFormat>
bool prepare(Device* device, ConstMatrix x, __nv_bfloat16* out) {
  prepare_kernel<kFormat><<<dim3(blocks_for(x.cols, kThreads), static_cast<unsigned>(x.rows)),
                            kThreads, 0, device->stream>>>(x, out);
  DSFP4_LAUNCHED("prepare_kernel");
  return true;
}

template <WeightFormat kFormat>
bool prepare_listed(Device* device, ConstMatrix x, const TaskList& list, std::int64_t per_row,
                    __nv_bfloat16* out) {
  prepare_listed_kernel<kFormat>
      <<<dim3(blocks_for(x.cols, kThreads), static_cast<unsigned>(list.pairs)), kThreads, 0,
         device->stream>>>(x, list.sorted, static_cast<int>(per_row), out);
  DSFP4_LAUNCHED("prepare_listed_kernel");
  return true;
}

template <WeightFormat kFormat>
bool dense_prepared(Device* device, const WeightView& weight, const __nv_bfloat16* prepared,
                    Matrix y, __nv_bfloat16* rounded) {
  LargeArguments arguments{};
  arguments.weight = weight;
  arguments.x = prepared;
  arguments.x_stride = weight.cols;
  arguments.tokens = y.rows;
  arguments.rows = weight.rows;
  arguments.cols = weight.cols;
  arguments.y = y;
  arguments.rounded = rounded;
  if (device->wgmma) return dense_hopper(device, arguments);
  const std::int64_t token_blocks = (y.rows + kLargeTokens - 1) / kLargeTokens;
  const std::int64_t tall =
      (weight.rows + LargeShape<kFormat, 4>::kRows - 1) / LargeShape<kFormat, 4>::kRows;
  if (tall * token_blocks >= 2 * device->multiprocessors) {
    return launch<kFormat, 4, Large::kDense>(device, arguments, tall, token_blocks);
  }
  return launch<kFormat, 1, Large::kDense>(
      device, arguments,
      (weight.rows + LargeShape<kFormat, 1>::kRows - 1) / LargeShape<kFormat, 1>::kRows,
      token_blocks);
}

template <WeightFormat kFormat>
bool dense(Device* device, const WeightView& weight, ConstMatrix x, Matrix y,
           std::byte* workspace) {
  auto* prepared = reinterpret_cast<__nv_bfloat16*>(workspace);
  return prepare<kFormat>(device, x, prepared) &&
         dense_prepared<kFormat>(device, weight, prepared, y, nullptr);
}

// Cached latents of tokens 0, 1, ... as prepared rows, and their rotated keys as plain ones.
template <WeightFormat kFormat>
__global__ void gather_kernel(MlaShape shape, KvRows kv, std::int64_t first_block,
                              __nv_bfloat16* latents, __nv_bfloat16* keys) {
  const std::int64_t s = blockIdx.x;
  const std::int64_t lora = shape.kv_lora_rank;
  const std::int64_t width = shape.cache_width();
  const std::byte* block = kv.blocks[first_block + s / kKvBlockTokens] + kv.layer_offset;
  for (std::int64_t i = threadIdx.x; i < width; i += kThreads) {
    const std::int64_t at = s % kKvBlockTokens * width + i;
    __nv_bfloat16 value;
    if (kv.format == KvFormat::kBf16) {
      value = reinterpret_cast<const __nv_bfloat16*>(block)[at];
    } else {
      value = __float2bfloat16_rn(e4m3_value(reinterpret_cast<const unsigned char*>(block)[at]) *
                                  kv.scale);
    }
    if (i < lora) {
      latents[s * lora + activation_place<kFormat>(i)] = value;
    } else {
      keys[s * (width - lora) + i - lora] = value;
    }
  }
}

struct Grouped {
  __nv_bfloat16* x;
  __nv_bfloat16* hidden;
  std::int32_t* sorted = nullptr;
  LargeTask* tasks = nullptr;
  std::int32_t* task_count = nullptr;

  explicit Grouped(const GroupedActivations& space)
      : x(reinterpret_cast<__nv_bfloat16*>(space.x)),
        hidden(reinterpret_cast<__nv_bfloat16*>(space.hidden)) {}
};

// hidden, then routed, of grouped pairs, whose x is prepared; prepare_hidden() is for between.
template <WeightFormat kFormat, class PrepareHidden>
bool grouped_products(Device* device, const ExpertView* table, const ExpertView& first,
                      std::int64_t top_k, Matrix hidden, Matrix routed, const Grouped& grouped,
                      int tile, std::int64_t tasks, const PrepareHidden& prepare_hidden) {
  LargeArguments arguments{};
  arguments.table = table;
  arguments.tasks = grouped.tasks;
  arguments.task_count = grouped.task_count;
  arguments.sorted = grouped.sorted;
  arguments.top_k = static_cast<int>(top_k);
  arguments.x = grouped.x;
  arguments.x_stride = first.gate_proj.cols;
  arguments.rows = first.gate_proj.rows;
  arguments.cols = first.gate_proj.cols;
  arguments.y = hidden;
  constexpr int kHiddenRows = LargeShape<kFormat, 4>::kRows / 2;
  if (device->wgmma) {
    if (!tasks_hopper(device, kFormat, Large::kGateUp, arguments, tile, tasks)) return false;
  } else if (!launch<kFormat, 4, Large::kGateUp>(
                 device, arguments, (hidden.cols + kHiddenRows - 1) / kHiddenRows, tasks)) {
    return false;
  }
  if (!prepare_hidden()) return false;
  arguments.x = grouped.hidden;
  arguments.x_stride = hidden.cols;
  arguments.rows = first.down_proj.rows;
  arguments.cols = hidden.cols;
  arguments.y = routed;
  if (device->wgmma) return tasks_hopper(device, kFormat, Large::kDown, arguments, tile, tasks);
  return launch<kFormat, 4, Large::kDown>(
      device, arguments,
      (routed.cols + LargeShape<kFormat, 4>::kRows - 1) / LargeShape<kFormat, 4>::kRows, tasks);
}

template <WeightFormat kFormat>
bool grouped_experts(Device* device, const ExpertView* table, const ExpertView& first,
                     std::int64_t experts, DeviceRouting routing, std::int64_t top_k, ConstMatrix x,
                     Matrix hidden, Matrix routed, const Grouped& grouped) {
  const std::int64_t pairs = x.rows * top_k;
  const int tile = large_tile(device, experts, pairs);
  group_kernel<<<1, 1024, static_cast<std::size_t>(2 * experts) * sizeof(std::int32_t),
                 device->stream>>>(routing.used, static_cast<int>(pairs), static_cast<int>(experts),
                                   tile, grouped.sorted, grouped.tasks, grouped.task_count);
  DSFP4_LAUNCHED("group_kernel");
  return prepare<kFormat>(device, x, grouped.x) &&
         grouped_products<kFormat>(device, table, first, top_k, hidden, routed, grouped, tile,
                                   most_runs(experts, pairs, tile), [&] {
                                     return prepare<kFormat>(device, hidden, grouped.hidden);
                                   });
}

// Rows that the list names, where these are fewer than all.
template <WeightFormat kFormat>
bool listed_experts(Device* device, const TaskList& list, const ExpertView& first,
                    std::int64_t top_k, ConstMatrix x, Matrix hidden, Matrix routed,
                    const Grouped& grouped) {
  const bool x_ready = list.pairs < x.rows
                           ? prepare_listed<kFormat>(device, x, list, top_k, grouped.x)
                           : prepare<kFormat>(device, x, grouped.x);
  return x_ready &&
         grouped_products<kFormat>(
             device, list.table, first, top_k, hidden, routed, grouped, list.tile, list.most_runs,
             [&] { return prepare_listed<kFormat>(device, hidden, list, 1, grouped.hidden); });
}

bool whole_chunks(const WeightView& weight) {
  const std::int64_t chunk = weight.format == WeightFormat::kBF16       ? 32
                             : weight.format == WeightFormat::kFp8Block ? 64
                                                                        : 128;
  return has_words(weight) && weight.cols % chunk == 0 &&
         reinterpret_cast<std::uintptr_t>(weight.scales) % 8 == 0;
}

}  // namespace

bool linear_large_fit(const WeightView& weight) { return whole_chunks(weight); }

bool linear_large(Device* device, const WeightView& weight, ConstMatrix x, Matrix y,
                  std::byte* workspace) {
  return for_format(weight.format, [&]<WeightFormat kFormat>() {
    return dense<kFormat>(device, weight, x, y, workspace);
  });
}

bool experts_large_fit(const ExpertView& expert, std::int64_t experts) {
  const WeightFormat format = expert.gate_proj.format;
  return expert.up_proj.format == format && expert.down_proj.format == format && experts <= 4096 &&
         whole_chunks(expert.gate_proj) && whole_chunks(expert.up_proj) &&
         whole_chunks(expert.down_proj);
}

int large_tile(const Device* device, std::int64_t tasks, std::int64_t pairs) {
  if (!device->wgmma) return kLargeTokens;
  const std::int64_t mean = pairs / std::min(tasks, pairs);  // most experts' fit in one
  return mean <= 20 ? 32 : mean <= 44 ? 64 : kHopperTask;
}

bool experts_large(Device* device, const ExpertView* table, const ExpertView& first,
                   std::int64_t experts, DeviceRouting routing, std::int64_t top_k, ConstMatrix x,
                   Matrix hidden, Matrix routed, std::byte* workspace) {
  Carver carver(workspace);
  const GroupedExperts space = GroupedExperts::carve(carver, first, experts, x.rows, top_k);
  Grouped grouped(space.activations);
  grouped.sorted = space.sorted;
  grouped.tasks = space.tasks;
  grouped.task_count = space.task_count;
  return for_format(first.gate_proj.format, [&]<WeightFormat kFormat>() {
    return grouped_experts<kFormat>(device, table, first, experts, routing, top_k, x, hidden,
                                    routed, grouped);
  });
}

bool tasks_large(Device* device, const TaskList& list, const ExpertView& first, std::int64_t top_k,
                 ConstMatrix x, Matrix hidden, Matrix out, std::byte* workspace) {
  Carver carver(workspace);
  Grouped grouped(GroupedActivations::carve(carver, first, x.rows, top_k));
  grouped.sorted = list.sorted;
  grouped.tasks = list.runs;
  grouped.task_count = list.run_count;
  return for_format(first.gate_proj.format, [&]<WeightFormat kFormat>() {
    return listed_experts<kFormat>(device, list, first, top_k, x, hidden, out, grouped);
  });
}

bool gather_latents(Device* device, const MlaShape& shape, const WeightView& kv_b_proj,
                    const KvRows& kv, std::int64_t first_block, std::int64_t length,
                    __nv_bfloat16* latents, __nv_bfloat16* keys) {
  const auto launch_gather = [&](auto kernel) {
    kernel<<<static_cast<unsigned>(length), kThreads, 0, device->stream>>>(shape, kv, first_block,
                                                                           latents, keys);
  };
  switch (kv_b_proj.format) {
    case WeightFormat::kBF16:
      launch_gather(gather_kernel<WeightFormat::kBF16>);
      break;
    case WeightFormat::kFp8Block:
      launch_gather(gather_kernel<WeightFormat::kFp8Block>);
      break;
    case WeightFormat::kNvfp4:
    case WeightFormat::kMxfp4:
      launch_gather(gather_kernel<WeightFormat::kNvfp4>);
      break;
    case WeightFormat::kF32:
      return fail(cudaErrorInvalidValue, "gather_latents for FP32", __FILE__, __LINE__);
  }
  DSFP4_LAUNCHED("gather_kernel");
  return true;
}

bool linear_prepared(Device* device, const WeightView& weight, const __nv_bfloat16* prepared,
                     std::int64_t tokens, __nv_bfloat16* out) {
  const Matrix shape{nullptr, tokens, weight.rows, weight.rows};
  return for_format(weight.format, [&]<WeightFormat kFormat>() {
    return dense_prepared<kFormat>(device, weight, prepared, shape, out);
  });
}

}  // namespace dsfp4::ops::cuda
