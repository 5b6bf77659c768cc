// The pairs that the grouped kernels compute, in device memory.
#pragma once

#include "ops/cuda/common.cuh"

namespace dsfp4::ops::cuda {

/// A run of pairs that chose one expert: sorted[first, first + count).
struct LargeTask {
  std::int32_t expert, first, count;
};

/// The tasks of expert_tasks(): some of a step's pairs, and experts of their own.
struct TaskList {
  ExpertView* table;     // [tasks]
  std::int32_t* sorted;  // [pairs]: pairs of the step, task by task
  std::int32_t* used;    // [pairs]: their places in the table
  LargeTask* runs;       // [run_count]: the tasks, cut to `tile` pairs
  std::int32_t* run_count;
  std::int64_t tasks, pairs, most_runs;
  int tile;
};

// linear_large.cu
/// Pairs of a run, where `tasks` experts have `pairs`; and how many runs they can be.
int large_tile(const Device* device, std::int64_t tasks, std::int64_t pairs);
std::int64_t most_runs(std::int64_t tasks, std::int64_t pairs, int tile);
constexpr int kLeastTile = 32;
/// Activations of those pairs as the kernels read them, for steps of `tokens`.
std::size_t tasks_large_workspace(const ExpertView& expert, std::int64_t tokens,
                                  std::int64_t top_k);
/// Of experts for which experts_large_fit() holds, each; `first` is one of them, on the host.
bool tasks_large(Device*, const TaskList& list, const ExpertView& first, std::int64_t top_k,
                 ConstMatrix x, Matrix hidden, Matrix out, std::byte* workspace);

// experts_small.cu: each pair by itself; reads nothing of an expert before the kernel before ends.
bool tasks_small_fit(Device*, const ExpertView& expert, ConstMatrix x, ConstMatrix hidden);
/// `hidden` holds digits, or values, of the pairs in the list's order.
bool tasks_small(Device*, const TaskList& list, const ExpertView& first, std::int64_t top_k,
                 ConstMatrix x, Matrix hidden, Matrix out);

// experts.cu: any shape, alignment and format.
bool tasks_plain(Device*, const TaskList& list, std::int64_t top_k, ConstMatrix x, Matrix hidden,
                 Matrix out);

/// Up to here tokens seldom share an expert.
constexpr std::int64_t kFewTokens = 4;

}  // namespace dsfp4::ops::cuda
