// Some pairs of a step, from a list of tasks on the host: the list is brought to the device,
// then come the kernels that fit. Where results are added at once, the tokens of the pairs are
// gathered first, so that scratch has a row for each pair of the call only.
#include <numeric>
#include <vector>

#include "ops/cuda/common.cuh"
#include "ops/cuda/decode.cuh"
#include "ops/cuda/kernels.h"
#include "ops/cuda/task_list.cuh"

namespace dsfp4::ops::cuda {
namespace {

enum class Path { kPlain, kSmall, kLarge };

bool has_shape(const WeightView& weight, std::int64_t rows, std::int64_t cols) {
  return weight.rows == rows && weight.cols == cols;
}

// Writes the list to host memory.
void fill(const TaskList& to, const ExpertTask* tasks) {
  std::int32_t at = 0;
  std::int32_t runs = 0;
  for (std::int32_t t = 0; t < to.tasks; ++t) {
    const auto count = static_cast<std::int32_t>(tasks[t].pairs.size());
    to.table[t] = *tasks[t].expert;
    for (std::int32_t first = 0; first < count; first += to.tile) {
      to.runs[runs++] = {t, at + first, std::min(count - first, to.tile)};
    }
    for (const std::int32_t pair : tasks[t].pairs) {
      to.sorted[at] = pair;
      to.used[at++] = t;
    }
  }
  *to.run_count = runs;
}

// The number of pairs; -1, and the failure noted, where the tasks do not fit the step.
std::int64_t checked_pairs(const ExpertTask* tasks, std::int64_t count, std::int64_t top_k,
                           ConstMatrix x, ConstMatrix hidden, ConstMatrix out) {
  std::int64_t pairs = 0;
  for (std::int64_t t = 0; t < count; ++t) {
    const ExpertView& expert = *tasks[t].expert;
    if (!has_shape(expert.gate_proj, hidden.cols, x.cols) ||
        !has_shape(expert.up_proj, hidden.cols, x.cols) ||
        !has_shape(expert.down_proj, out.cols, hidden.cols)) {
      fail(cudaErrorInvalidValue, "expert_tasks: an expert of another shape", __FILE__, __LINE__);
      return -1;
    }
    for (const std::int32_t pair : tasks[t].pairs) {
      if (pair < 0 || pair >= x.rows * top_k) {
        fail(cudaErrorInvalidValue, "expert_tasks: a pair that is not in the step", __FILE__,
             __LINE__);
        return -1;
      }
    }
    pairs += static_cast<std::int64_t>(tasks[t].pairs.size());
  }
  if (pairs > x.rows * top_k) {
    fail(cudaErrorInvalidValue, "expert_tasks: a pair named twice", __FILE__, __LINE__);
    return -1;
  }
  return pairs;
}

// By the step and the experts, never by how many pairs are in the call.
Path path_of(Device* device, const ExpertTask* tasks, std::int64_t count, ConstMatrix x,
             ConstMatrix hidden) {
  bool large = x.rows > kFewTokens;
  bool small = true;
  for (std::int64_t t = 0; t < count; ++t) {
    const ExpertView& expert = *tasks[t].expert;
    if (expert.gate_proj.format != tasks[0].expert->gate_proj.format) return Path::kPlain;
    large = large && experts_large_fit(expert, 1);
    small = small && tasks_small_fit(device, expert, x, hidden);
  }
  return large ? Path::kLarge : small ? Path::kSmall : Path::kPlain;
}

constexpr int kThreads = 256;

// to[r] = x[pairs[r] / top_k].
__global__ void gather_kernel(ConstMatrix x, const std::int32_t* pairs, std::int64_t top_k,
                              Matrix to) {
  begin_kernel();
  const std::int64_t i = blockIdx.x * std::int64_t{kThreads} + threadIdx.x;
  const std::int64_t row = blockIdx.y;
  if (i >= x.cols) return;
  to.data[row * to.stride + i] = x.data[pairs[row] / top_k * x.stride + i];
}

// y[pairs[r] / top_k] += weights[pairs[r]] * results[r], for pairs of distinct tokens.
__global__ void add_weighted_kernel(ConstMatrix results, const std::int32_t* pairs,
                                    const float* weights, std::int64_t top_k, Matrix y) {
  begin_kernel();
  const std::int64_t i = blockIdx.x * std::int64_t{kThreads} + threadIdx.x;
  const std::int64_t row = blockIdx.y;
  if (i >= y.cols) return;
  const std::int32_t pair = pairs[row];
  y.data[pair / top_k * y.stride + i] += weights[pair] * results.data[row * results.stride + i];
}

__global__ void bring_kernel(const uint4* from, uint4* to, std::size_t count) {
  begin_kernel();
  const std::size_t i = blockIdx.x * std::size_t{kThreads} + threadIdx.x;
  if (i < count) to[i] = from[i];
}

// Brings a list from the ring. A kernel reads it: a copy would stand in line behind experts that
// are being uploaded, and those wait for what this list is for. Writes up to a multiple of 16
// bytes.
bool bring(Device* device, const std::byte* staged, void* to, std::size_t bytes) {
  if (device->ring_there == nullptr) {
    DSFP4_TRY(cudaMemcpyAsync(to, staged, bytes, cudaMemcpyHostToDevice, device->stream));
    return true;
  }
  const auto* from = reinterpret_cast<const uint4*>(device->ring_there + (staged - device->ring));
  const std::size_t count = (bytes + sizeof(uint4) - 1) / sizeof(uint4);
  DSFP4_TRY(launch(device, bring_kernel,
                   dim3(blocks_for(static_cast<std::int64_t>(count), kThreads)), kThreads, 0, from,
                   static_cast<uint4*>(to), count));
  return true;
}

// The pairs of all tasks, one after the other, to device memory.
bool copy_pairs(Device* device, const ExpertTask* tasks, std::int64_t count, std::int64_t pairs,
                std::int32_t* to) {
  std::size_t bytes = static_cast<std::size_t>(pairs) * sizeof(std::int32_t);
  if (bytes > kMostTaskBytes) {
    return fail(cudaErrorInvalidValue, "add_expert_tasks: more than kMostTaskBytes of pairs",
                __FILE__, __LINE__);
  }
  std::byte* staged = ring_space(device, bytes, true);
  if (staged == nullptr) return false;
  auto* at = reinterpret_cast<std::int32_t*>(staged);
  for (std::int64_t t = 0; t < count; ++t) {
    at = std::copy(tasks[t].pairs.begin(), tasks[t].pairs.end(), at);
  }
  return bring(device, staged, to, bytes);
}

}  // namespace

bool expert_tasks(Device* device, const ExpertTask* tasks, std::int64_t count, std::int64_t top_k,
                  ConstMatrix x, Matrix hidden, Matrix out, std::byte* workspace) {
  const std::int64_t pairs = checked_pairs(tasks, count, top_k, x, hidden, out);
  if (pairs <= 0) return pairs == 0;
  const Path path = path_of(device, tasks, count, x, hidden);
  const int tile = path == Path::kLarge ? large_tile(device, count, pairs) : kLeastTile;
  Carver there(workspace);
  const TaskList list = TaskList::carve(there, count, pairs, tile);
  std::size_t bytes = there.used();
  if (bytes > kMostTaskBytes) {
    return fail(cudaErrorInvalidValue, "expert_tasks: more than kMostTaskBytes of tasks", __FILE__,
                __LINE__);
  }
  std::byte* staged = ring_space(device, bytes, true);
  if (staged == nullptr) return false;
  Carver here(staged);
  fill(TaskList::carve(here, count, pairs, tile), tasks);
  if (!bring(device, staged, workspace, bytes)) return false;
  const ExpertView& first = *tasks[0].expert;
  switch (path) {
    case Path::kLarge:
      return tasks_large(device, list, first, top_k, x, hidden, out, workspace + there.used());
    case Path::kSmall:
      return tasks_small(device, list, first, top_k, x, hidden, out);
    case Path::kPlain:
      break;
  }
  return tasks_plain(device, list, top_k, x, hidden, out);
}

bool add_expert_tasks(Device* device, const ExpertTask* tasks, std::int64_t count,
                      std::int64_t top_k, ConstMatrix x, const float* weights, Matrix hidden,
                      Matrix out, Matrix y, std::byte* workspace) {
  const std::int64_t pairs = checked_pairs(tasks, count, top_k, x, hidden, out);
  if (pairs <= 0) return pairs == 0;
  if (pairs > std::min(hidden.rows, out.rows)) {
    return fail(cudaErrorInvalidValue, "add_expert_tasks: more pairs than rows of scratch",
                __FILE__, __LINE__);
  }
  Carver carver(workspace);
  auto* const there = carver.take<std::int32_t>(pairs);
  if (!copy_pairs(device, tasks, count, pairs, there)) return false;
  const unsigned blocks = blocks_for(out.cols, kThreads);
  DSFP4_TRY(launch(device, gather_kernel, dim3(blocks, static_cast<unsigned>(pairs)), kThreads, 0,
                   x, there, top_k, out));

  // Pairs by their rows of scratch, each a token of its own. Its x is read before its result is
  // written. Not the call but the step chooses the kernels: by the rows of `out`.
  std::vector<std::int32_t> rows(static_cast<std::size_t>(pairs));
  std::iota(rows.begin(), rows.end(), 0);
  std::vector<ExpertTask> placed;
  placed.reserve(static_cast<std::size_t>(count));
  std::size_t first = 0;
  for (std::int64_t t = 0; t < count; ++t) {
    placed.push_back({tasks[t].expert, std::span(rows).subspan(first, tasks[t].pairs.size())});
    first += tasks[t].pairs.size();
  }
  const std::int64_t tokens = std::max(pairs, std::min(out.rows, kFewTokens + 1));
  const ConstMatrix gathered{out.data, tokens, out.cols, out.stride};
  if (!expert_tasks(device, placed.data(), count, 1, gathered, hidden, out,
                    workspace + carver.used())) {
    return false;
  }

  std::int64_t row = 0;
  for (std::int64_t t = 0; t < count; ++t) {
    const auto size = static_cast<std::int64_t>(tasks[t].pairs.size());
    if (size == 0) continue;
    const ConstMatrix results{out.data + row * out.stride, size, out.cols, out.stride};
    DSFP4_TRY(launch(device, add_weighted_kernel, dim3(blocks, static_cast<unsigned>(size)),
                     kThreads, 0, results, there + row, weights, top_k, y));
    row += size;
  }
  return true;
}

}  // namespace dsfp4::ops::cuda
