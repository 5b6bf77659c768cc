// The chosen experts of a layer, read through the device's table of experts.
#include "ops/cuda/common.cuh"
#include "ops/cuda/decode.cuh"
#include "ops/cuda/kernels.h"
#include "ops/cuda/task_list.cuh"

namespace dsfp4::ops::cuda {
namespace {

constexpr int kWarps = 4;

// One warp a (pair, row): hidden = silu(gate x) * up x. `pairs`: those of the grid; null: all, in
// order.
__global__ void gate_up_plain_kernel(const ExpertView* table, const std::int32_t* used,
                                     const std::int32_t* pairs, std::int64_t top_k, ConstMatrix x,
                                     Matrix hidden) {
  const std::int64_t row = blockIdx.x * std::int64_t{kWarps} + threadIdx.x / 32;
  if (row >= hidden.cols) return;
  const std::int64_t pair = pairs == nullptr ? blockIdx.y : pairs[blockIdx.y];
  const ExpertView& expert = table[used[blockIdx.y]];
  const float* token = x.data + pair / top_k * x.stride;
  float gate = 0.0f;
  float up = 0.0f;
  for (std::int64_t i = threadIdx.x % 32; i < x.cols; i += 32) {
    const float value = round_bf16(token[i]);
    gate = fmaf(weight_value(expert.gate_proj, row, i), value, gate);
    up = fmaf(weight_value(expert.up_proj, row, i), value, up);
  }
  gate = warp_sum(gate) * epilogue_scale(expert.gate_proj);
  up = warp_sum(up) * epilogue_scale(expert.up_proj);
  if (threadIdx.x % 32 == 0) hidden.data[pair * hidden.stride + row] = silu(gate) * up;
}

__global__ void down_plain_kernel(const ExpertView* table, const std::int32_t* used,
                                  const std::int32_t* pairs, Matrix hidden, Matrix routed) {
  const std::int64_t row = blockIdx.x * std::int64_t{kWarps} + threadIdx.x / 32;
  if (row >= routed.cols) return;
  const std::int64_t pair = pairs == nullptr ? blockIdx.y : pairs[blockIdx.y];
  const WeightView& down = table[used[blockIdx.y]].down_proj;
  const float* from = hidden.data + pair * hidden.stride;
  float sum = 0.0f;
  for (std::int64_t i = threadIdx.x % 32; i < hidden.cols; i += 32) {
    sum = fmaf(weight_value(down, row, i), round_bf16(from[i]), sum);
  }
  sum = warp_sum(sum) * epilogue_scale(down);
  if (threadIdx.x % 32 == 0) routed.data[pair * routed.stride + row] = sum;
}

// `pairs` as the kernels take them, `count` of them.
bool plain(Device* device, const ExpertView* table, const std::int32_t* used,
           const std::int32_t* pairs, std::int64_t count, std::int64_t top_k, ConstMatrix x,
           Matrix hidden, Matrix routed) {
  const auto grid_rows = static_cast<unsigned>(count);
  gate_up_plain_kernel<<<dim3(blocks_for(hidden.cols, kWarps), grid_rows), kWarps * 32, 0,
                         device->stream>>>(table, used, pairs, top_k, x, hidden);
  DSFP4_LAUNCHED("gate_up_plain_kernel");
  down_plain_kernel<<<dim3(blocks_for(routed.cols, kWarps), grid_rows), kWarps * 32, 0,
                      device->stream>>>(table, used, pairs, hidden, routed);
  DSFP4_LAUNCHED("down_plain_kernel");
  return true;
}

bool is_large(const ExpertView& first, std::int64_t experts, std::int64_t tokens) {
  return tokens > kFewTokens && experts_large_fit(first, experts);
}

}  // namespace

bool routed_experts(Device* device, const ExpertView* table, const ExpertView* first,
                    std::int64_t experts, DeviceRouting routing, std::int64_t top_k, ConstMatrix x,
                    Matrix hidden, Matrix routed, Matrix y, const ExpertView* shared,
                    std::byte* workspace) {
  if (x.rows == 0) return true;
  if (shared != nullptr) {
    return experts_small(device, table, *first, experts, routing, top_k, x, hidden, y, shared);
  }
  if (is_large(*first, experts, x.rows)) {
    return experts_large(device, table, *first, experts, routing, top_k, x, hidden, routed,
                         workspace) &&
           combine(device, routed, routing.weights, top_k, y);
  }
  if (experts_small_fit(device, *first, x, hidden, top_k)) {
    return experts_small(device, table, *first, experts, routing, top_k, x, hidden, y, nullptr);
  }
  return plain(device, table, routing.used, nullptr, x.rows * top_k, top_k, x, hidden, routed) &&
         combine(device, routed, routing.weights, top_k, y);
}

bool tasks_plain(Device* device, const TaskList& list, std::int64_t top_k, ConstMatrix x,
                 Matrix hidden, Matrix out) {
  return plain(device, list.table, list.used, list.sorted, list.pairs, top_k, x, hidden, out);
}

bool takes_shared(Device* device, const ExpertView* first, const ExpertView* shared,
                  std::int64_t tokens, std::int64_t top_k) {
  const auto alike = [](const WeightView& a, const WeightView& b) {
    return a.format == b.format && a.rows == b.rows && a.cols == b.cols;
  };
  if (tokens > kFewTokens || !alike(first->gate_proj, shared->gate_proj) ||
      !alike(first->up_proj, shared->up_proj) || !alike(first->down_proj, shared->down_proj)) {
    return false;
  }
  const std::int64_t width = first->down_proj.cols;
  const ConstMatrix x{nullptr, tokens, first->gate_proj.cols, first->gate_proj.cols};
  const ConstMatrix hidden{nullptr, tokens * (top_k + 1), width, width};
  return experts_small_fit(device, *first, x, hidden, top_k + 1) &&
         experts_small_fit(device, *shared, x, hidden, top_k + 1);
}

}  // namespace dsfp4::ops::cuda
