#include "ops/cuda_memory.h"

#include <algorithm>
#include <bit>

#include "ops/cuda/workspaces.h"
#include "ops/host_routing.h"
#include "ops/raw.h"

namespace dsfp4::ops {
namespace {

// Of the experts of one layer, in a step that large.
std::size_t experts_workspace(const Ops::Largest& largest) {
  if (largest.experts.empty()) return 0;
  const raw::ExpertView first = unwrap(largest.experts.front());
  const auto experts = static_cast<std::int64_t>(largest.experts.size());
  // Results of all pairs are kept for few rows only; those of other steps are added at once.
  const std::int64_t kept = std::min(largest.rows, kMostHostRows);
  return std::max(
      {cuda::experts_workspace(first, experts, kept, largest.top_k),
       cuda::expert_tasks_workspace(first, experts, kept, largest.top_k),
       cuda::add_expert_tasks_workspace(first, experts, added_pairs(largest.rows, largest.top_k))});
}

}  // namespace

std::int64_t rounded_length(std::int64_t tokens) {
  return static_cast<std::int64_t>(
      std::bit_ceil(static_cast<std::uint64_t>(std::max(tokens, kKvBlockTokens))));
}

CudaStepMemory cuda_step_memory(const Ops::Largest& largest) {
  const auto rows = static_cast<std::size_t>(largest.rows);
  const auto dense_rows = static_cast<std::size_t>(largest.dense_rows);
  const auto blocks = static_cast<std::size_t>(largest.context / kKvBlockTokens + 1);
  CudaStepMemory memory;
  memory.workspace =
      std::max({cuda::linear_workspace(largest.width, largest.dense_rows),
                cuda::prefill_workspace(largest.mla, largest.context),
                cuda::latent_workspace(largest.mla, 1, rounded_length(largest.context)),
                experts_workspace(largest),
                cuda::sample_workspace(std::max<std::int64_t>(largest.vocab, 1))});
  memory.ids = std::max(rows * sizeof(std::int32_t), kCudaSmallBuffer);
  memory.rows = std::max(dense_rows * sizeof(cuda::RowPlace), kCudaSmallBuffer);
  memory.blocks = std::max(blocks * sizeof(std::byte*), kCudaSmallBuffer);
  memory.forced = dense_rows * static_cast<std::size_t>(largest.top_k) * sizeof(std::int32_t);
  return memory;
}

std::uint64_t cuda_working_bytes(const Ops::Largest& largest) {
  const CudaStepMemory memory = cuda_step_memory(largest);
  const std::uint64_t tables = static_cast<std::uint64_t>(largest.moe_layers) *
                               largest.experts.size() * sizeof(raw::ExpertView);
  return memory.workspace + memory.ids + memory.rows + memory.blocks + memory.forced + tables;
}

}  // namespace dsfp4::ops
