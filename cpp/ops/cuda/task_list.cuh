// Kernels for a list of tasks (TaskList), and for the runs that it is cut to.
#pragma once

#include "ops/cuda/common.cuh"
#include "ops/cuda/workspaces.h"

namespace dsfp4::ops::cuda {

// linear_large.cu
/// Pairs of a run, where `tasks` experts have `pairs`.
int large_tile(const Device* device, std::int64_t tasks, std::int64_t pairs);
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

}  // namespace dsfp4::ops::cuda
