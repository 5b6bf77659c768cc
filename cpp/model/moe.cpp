#include <algorithm>
#include <numeric>
#include <vector>

#include "model/layers.h"

namespace dsfp4::model {
namespace {

using ops::ConstMatrix;
using ops::Matrix;

// Groups the (token, slot) pairs by expert; `pairs` is scratch with one entry a pair.
std::vector<ops::ExpertTask> tasks_by_expert(std::span<const MlpWeights> experts,
                                             std::span<const std::int32_t> used,
                                             std::span<std::int32_t> pairs) {
  std::iota(pairs.begin(), pairs.end(), 0);
  std::stable_sort(pairs.begin(), pairs.end(), [&](std::int32_t a, std::int32_t b) {
    return used[static_cast<std::size_t>(a)] < used[static_cast<std::size_t>(b)];
  });
  std::vector<ops::ExpertTask> tasks;
  for (std::size_t begin = 0; begin < pairs.size();) {
    const std::int32_t expert = used[static_cast<std::size_t>(pairs[begin])];
    std::size_t end = begin + 1;
    while (end < pairs.size() && used[static_cast<std::size_t>(pairs[end])] == expert) ++end;
    tasks.push_back(
        {&experts[static_cast<std::size_t>(expert)], pairs.subspan(begin, end - begin)});
    begin = end;
  }
  return tasks;
}

}  // namespace

void mlp(const MlpWeights& weights, ops::Backend& backend, memory::Arena& arena, ConstMatrix x,
         Matrix out) {
  const ScratchScope scope(arena);
  const Matrix gate = scratch_matrix(arena, x.rows, weights.gate_proj.rows);
  const Matrix up = scratch_matrix(arena, x.rows, weights.up_proj.rows);
  backend.linear(weights.gate_proj, x, gate);
  backend.linear(weights.up_proj, x, up);
  backend.silu_mul(gate, up);
  backend.linear(weights.down_proj, gate, out);
}

void moe(const ModelSpec& spec, const LayerWeights& weights, const ExpertChoice& choice,
         ops::Backend& backend, memory::Arena& arena, ConstMatrix x, Matrix out) {
  const ScratchScope scope(arena);
  const std::int64_t top_k = spec.router.top_k;
  const auto pair_count = static_cast<std::size_t>(x.rows * top_k);
  const auto ints = [&] {
    return std::span(arena.take_array<std::int32_t>(pair_count), pair_count);
  };

  const Matrix logits = scratch_matrix(arena, x.rows, spec.router.experts);
  backend.linear(weights.gate, x, logits, ops::Inputs::kF32);
  const ops::Routing routing{ints(), ints(),
                             std::span(arena.take_array<float>(pair_count), pair_count)};
  backend.route(spec.router, logits, weights.e_score_correction_bias, choice.forced, routing);
  if (!choice.chosen.empty()) std::ranges::copy(routing.experts, choice.chosen.begin());

  const auto tasks = tasks_by_expert(weights.experts, routing.used, ints());
  const auto pairs = static_cast<std::int64_t>(pair_count);
  const Matrix hidden = scratch_matrix(arena, pairs, spec.moe_intermediate_size);
  const Matrix routed = scratch_matrix(arena, pairs, spec.hidden_size);
  backend.experts(tasks, top_k, x, hidden, routed);

  if (spec.shared_intermediate_size > 0) {
    mlp(weights.shared_experts, backend, arena, x, out);
  } else {
    backend.zero(out);
  }
  backend.combine(routed, routing.weights, top_k, out);
}

std::size_t mlp_scratch_bytes(std::int64_t intermediate_size, std::int64_t rows) {
  return 2 *
         memory::Arena::padded(static_cast<std::size_t>(rows * intermediate_size) * sizeof(float));
}

std::size_t moe_scratch_bytes(const ModelSpec& spec, std::int64_t rows) {
  const std::int64_t pairs = rows * spec.router.top_k;
  const auto padded = [](std::int64_t values) {
    return memory::Arena::padded(static_cast<std::size_t>(values) * sizeof(float));
  };
  return padded(rows * spec.router.experts) + 4 * padded(pairs) +
         padded(pairs * spec.moe_intermediate_size) + padded(pairs * spec.hidden_size) +
         mlp_scratch_bytes(spec.shared_intermediate_size, rows);
}

}  // namespace dsfp4::model
