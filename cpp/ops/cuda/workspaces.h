// How the plugin's kernels divide their workspaces, and so how large these are. The kernels and the
// core count with the same lines, and none needs a GPU: a plan may be for one that is not there.
//
// Sizes are upper bounds: for the kernels that a shape may get, and for any number of
// multiprocessors.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "ops/cuda/abi.h"

namespace dsfp4::ops::cuda {

constexpr std::size_t kWorkspaceAlignment = 256;
inline std::size_t aligned(std::size_t bytes) {
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

/// Hands out a workspace from front to back; with a null base it only counts.
class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}
  template <typename T>
  T* take(std::int64_t count) {
    T* taken = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += aligned(static_cast<std::size_t>(count) * sizeof(T));
    return taken;
  }
  std::size_t used() const { return used_; }

 private:
  std::byte* base_;
  std::size_t used_ = 0;
};

/// A value of 16 bits, BF16 or FP16: a type that a host compiler knows.
struct Half16 {
  std::uint16_t bits;
};

// ---- products -----------------------------------------------------------------------------------

/// Up to here linear() keeps a token's whole row in shared memory and reads a weight once.
constexpr std::int64_t kFewRows = 8;
/// Up to here tokens seldom share an expert.
constexpr std::int64_t kFewTokens = 4;

/// Activations in BF16, of linear() with more than kFewRows tokens of `cols` values.
inline std::size_t linear_workspace(std::int64_t cols, std::int64_t tokens) {
  return tokens > kFewRows ? static_cast<std::size_t>(tokens * cols) * sizeof(Half16) : 0;
}

/// A run of pairs that chose one expert: sorted[first, first + count).
struct LargeTask {
  std::int32_t expert, first, count;
};

/// The least pairs of a run.
constexpr int kLeastTile = 32;
/// The most runs that `tasks` experts with `pairs` pairs are cut to.
inline std::int64_t most_runs(std::int64_t tasks, std::int64_t pairs, int tile) {
  return std::min(tasks, pairs) + pairs / tile;
}

/// Activations of the grouped kernels as they read them: [tokens, hidden_size] and [pairs,
/// moe_intermediate_size].
struct GroupedActivations {
  Half16* x;
  Half16* hidden;

  static GroupedActivations carve(Carver& carver, const ExpertView& expert, std::int64_t tokens,
                                  std::int64_t top_k) {
    GroupedActivations space{};
    space.x = carver.take<Half16>(tokens * expert.gate_proj.cols);
    space.hidden = carver.take<Half16>(tokens * top_k * expert.down_proj.cols);
    return space;
  }
};

/// routed_experts() of more than kFewTokens tokens.
struct GroupedExperts {
  GroupedActivations activations;
  std::int32_t* sorted;
  LargeTask* tasks;
  std::int32_t* task_count;

  static GroupedExperts carve(Carver& carver, const ExpertView& expert, std::int64_t experts,
                              std::int64_t tokens, std::int64_t top_k) {
    GroupedExperts space{};
    space.activations = GroupedActivations::carve(carver, expert, tokens, top_k);
    space.sorted = carver.take<std::int32_t>(tokens * top_k);
    space.tasks = carver.take<LargeTask>(most_runs(experts, tokens * top_k, kLeastTile));
    space.task_count = carver.take<std::int32_t>(1);
    return space;
  }
};
inline std::size_t experts_workspace(const ExpertView& first, std::int64_t experts,
                                     std::int64_t tokens, std::int64_t top_k) {
  if (tokens <= kFewTokens) return 0;
  Carver carver(nullptr);
  GroupedExperts::carve(carver, first, experts, tokens, top_k);
  return carver.used();
}

/// The tasks of expert_tasks(): some of a step's pairs, and experts of their own. Both ends of the
/// copy to the device are laid out so.
struct TaskList {
  ExpertView* table;     // [tasks]
  std::int32_t* sorted;  // [pairs]: pairs of the step, task by task
  std::int32_t* used;    // [pairs]: their places in the table
  LargeTask* runs;       // [run_count]: the tasks, cut to `tile` pairs
  std::int32_t* run_count;
  std::int64_t tasks, pairs, most_runs;
  int tile;

  static TaskList carve(Carver& carver, std::int64_t tasks, std::int64_t pairs, int tile) {
    TaskList list{};
    list.tasks = tasks;
    list.pairs = pairs;
    list.tile = tile;
    list.most_runs = cuda::most_runs(tasks, pairs, tile);
    list.table = carver.take<ExpertView>(tasks);
    list.sorted = carver.take<std::int32_t>(pairs);
    list.used = carver.take<std::int32_t>(pairs);
    list.runs = carver.take<LargeTask>(list.most_runs);
    list.run_count = carver.take<std::int32_t>(1);
    return list;
  }
};
/// For up to `tasks` tasks and all pairs of `tokens` tokens.
inline std::size_t expert_tasks_workspace(const ExpertView& expert, std::int64_t tasks,
                                          std::int64_t tokens, std::int64_t top_k) {
  Carver carver(nullptr);
  TaskList::carve(carver, tasks, tokens * top_k, kLeastTile);
  if (tokens > kFewTokens) GroupedActivations::carve(carver, expert, tokens, top_k);
  return carver.used();
}

/// For up to `tasks` tasks and `rows` rows of add_expert_tasks()'s `out`.
inline std::size_t add_expert_tasks_workspace(const ExpertView& expert, std::int64_t tasks,
                                              std::int64_t rows) {
  Carver carver(nullptr);
  carver.take<std::int32_t>(rows);  // the pairs
  return carver.used() + expert_tasks_workspace(expert, tasks, std::max(rows, kFewTokens + 1), 1);
}

// ---- attention ----------------------------------------------------------------------------------

/// prefill_attention() of any geometry: heads are expanded together as far as they fit in so many
/// values, and at least one.
constexpr std::int64_t kPlainExpandedValues = std::int64_t{64} << 20;
inline std::int64_t plain_head_values(const MlaShape& shape, std::int64_t length) {
  return length * (shape.qk_head_dim() + shape.v_head_dim);
}
inline std::size_t prefill_plain_workspace(const MlaShape& shape, std::int64_t length) {
  const std::int64_t one_head = plain_head_values(shape, length);
  return static_cast<std::size_t>(
             std::max(one_head, std::min(shape.heads * one_head, kPlainExpandedValues))) *
         sizeof(float);
}

/// The same of DeepSeek's geometry, with kernels that take so many values.
constexpr std::int64_t kExpandedValues = std::int64_t{160} << 20;
struct ExpandedHeads {
  Half16* latents;   // [length, kv_lora_rank]
  Half16* keys;      // [length, qk_rope_head_dim]
  Half16* expanded;  // [length, heads at once * (qk_nope_head_dim + v_head_dim)]

  static std::int64_t one_head(const MlaShape& shape, std::int64_t length) {
    return length * (shape.qk_nope_head_dim + shape.v_head_dim);
  }
  static std::int64_t heads_at_once(const MlaShape& shape, std::int64_t length) {
    return std::clamp<std::int64_t>(kExpandedValues / one_head(shape, length), 1, shape.heads);
  }
  static ExpandedHeads carve(Carver& carver, const MlaShape& shape, std::int64_t length) {
    ExpandedHeads space{};
    space.latents = carver.take<Half16>(length * shape.kv_lora_rank);
    space.keys = carver.take<Half16>(length * shape.qk_rope_head_dim);
    const std::int64_t one = one_head(shape, length);
    space.expanded =
        carver.take<Half16>(std::max(one, std::min(shape.heads * one, kExpandedValues)));
    return space;
  }
};
/// Of either: weights also decide which kernel runs.
inline std::size_t prefill_workspace(const MlaShape& shape, std::int64_t length) {
  Carver carver(nullptr);
  ExpandedHeads::carve(carver, shape, length);
  return std::max(prefill_plain_workspace(shape, length), carver.used());
}

/// latent_attention() divides a cache into so many parts at most, of one tile or more.
constexpr int kMostSplits = 256;
constexpr std::int64_t kTileTokens = kKvBlockTokens;
/// Heads of one block of threads.
constexpr std::int64_t kBlockHeads = 64;
inline std::int64_t tiles_of(std::int64_t length) {
  return std::max<std::int64_t>((length + kTileTokens - 1) / kTileTokens, 1);
}
/// The results of the parts, to be combined: [rows, splits, heads in whole groups], and outputs
/// with kv_lora_rank values more.
struct LatentParts {
  Half16* outputs;
  float* largest;
  float* total;

  static LatentParts carve(Carver& carver, const MlaShape& shape, std::int64_t rows,
                           std::int64_t splits) {
    const std::int64_t groups = (shape.heads + kBlockHeads - 1) / kBlockHeads;
    const std::int64_t count = rows * splits * groups * kBlockHeads;
    LatentParts parts{};
    parts.outputs = carver.take<Half16>(count * shape.kv_lora_rank);
    parts.largest = carver.take<float>(count);
    parts.total = carver.take<float>(count);
    return parts;
  }
};
/// Multiprocessors of a GPU that parts are made for; more rest.
constexpr std::int64_t kMostMultiprocessors = 256;
/// Parts that keep a GPU busy once.
inline std::int64_t latent_splits(const MlaShape& shape, std::int64_t rows, std::int64_t length,
                                  std::int64_t multiprocessors) {
  const std::int64_t groups = (shape.heads + kBlockHeads - 1) / kBlockHeads;
  const std::int64_t blocks = std::max<std::int64_t>(rows * groups, 1);
  return std::min(std::clamp<std::int64_t>(multiprocessors / blocks, 1, kMostSplits),
                  tiles_of(length));
}
inline std::size_t latent_workspace(const MlaShape& shape, std::int64_t rows, std::int64_t length) {
  Carver carver(nullptr);
  LatentParts::carve(carver, shape, rows, latent_splits(shape, rows, length, kMostMultiprocessors));
  return carver.used();
}

// ---- sampling -----------------------------------------------------------------------------------

/// Of the sort of `vocab` pairs: a second copy of them, and histograms. sample() fails with a
/// CudaError where a toolkit's sort takes more.
inline std::int64_t sort_bytes(std::int64_t vocab) { return vocab * 16 + (std::int64_t{4} << 20); }
struct SampleSpace {
  float* keys;
  float* sorted_keys;
  std::int32_t* ids;
  std::int32_t* sorted_ids;
  std::int32_t* out;
  std::byte* sort;  // [sort_bytes()]

  static SampleSpace carve(Carver& carver, std::int64_t vocab) {
    SampleSpace space{};
    space.out = carver.take<std::int32_t>(1);
    space.keys = carver.take<float>(vocab);
    space.sorted_keys = carver.take<float>(vocab);
    space.ids = carver.take<std::int32_t>(vocab);
    space.sorted_ids = carver.take<std::int32_t>(vocab);
    space.sort = carver.take<std::byte>(sort_bytes(vocab));
    return space;
  }
};
inline std::size_t sample_workspace(std::int64_t vocab) {
  Carver carver(nullptr);
  SampleSpace::carve(carver, vocab);
  return carver.used();
}

}  // namespace dsfp4::ops::cuda
