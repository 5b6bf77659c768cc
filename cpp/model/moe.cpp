#include <algorithm>

#include "model/layers.h"
#include "residency/resident_experts.h"
#include "residency/tiered_experts.h"

namespace dsfp4::model {
using ops::ConstMatrix;
using ops::Matrix;
using ops::scratch_matrix;

std::unique_ptr<residency::ExpertWork> start_moe(const ModelSpec& spec, std::int64_t layer,
                                                 const LayerWeights& weights,
                                                 const ExpertChoice& choice, ops::Backend& backend,
                                                 residency::ExpertRunner& experts,
                                                 residency::ReadAhead& ahead, memory::Arena& arena,
                                                 ConstMatrix x, Matrix out) {
  const std::int64_t top_k = spec.router.top_k;
  const auto pairs = static_cast<std::size_t>(x.rows * top_k);
  const auto ints = [&] { return std::span(arena.take_array<std::int32_t>(pairs), pairs); };

  const Matrix logits = scratch_matrix(arena, x.rows, spec.router.experts);
  backend.linear(weights.gate, x, logits, ops::Inputs::kF32);
  const ops::Routing routing{ints(), ints(), std::span(arena.take_array<float>(pairs), pairs),
                             logits};
  backend.route(spec.router, logits, weights.e_score_correction_bias, choice.forced, routing);
  if (!choice.chosen.empty()) {
    backend.download(routing.experts.data(), choice.chosen.data(), choice.chosen.size_bytes());
  }
  if (!choice.logits.empty()) {
    backend.download(logits.data, choice.logits.data(), choice.logits.size_bytes());
  }

  const bool has_shared = spec.shared_intermediate_size > 0;
  return experts.start(
      {layer, x, routing, top_k, out, has_shared ? &weights.shared_experts : nullptr}, arena,
      ahead);
}

std::size_t moe_scratch_bytes(const ModelSpec& spec, std::int64_t rows) {
  const residency::MoeShape shape{spec.hidden_size, spec.moe_intermediate_size,
                                  spec.shared_intermediate_size, spec.router.experts,
                                  spec.router.top_k};
  return ops::scratch_bytes(rows * shape.experts) + 3 * ops::scratch_bytes(rows * shape.top_k) +
         std::max(residency::ResidentExperts::scratch_bytes(shape, rows),
                  residency::TieredExperts::scratch_bytes(shape, rows));
}

}  // namespace dsfp4::model
