#include <algorithm>

#include "model/layers.h"
#include "residency/resident_experts.h"
#include "residency/tiered_experts.h"

namespace dsfp4::model {

void choose_experts(const ModelSpec& spec, const LayerWeights& weights, Phase phase,
                    std::span<const std::int32_t> forced, ops::Ops& ops, ops::ConstMatrix x,
                    const ops::Routing& routing) {
  const ops::Matrix logits = routing.logits;
  ops.linear(weights.gate, x, logits, phase, ops::Inputs::kF32);
  ops.route(spec.router, logits, weights.e_score_correction_bias, forced, routing);
}

std::size_t experts_scratch_bytes(const ModelSpec& spec, std::int64_t rows, Phase phase) {
  const residency::MoeShape shape{spec.hidden_size, spec.moe_intermediate_size,
                                  spec.shared_intermediate_size, spec.router};
  return std::max(residency::ResidentExperts::scratch_bytes(shape, rows, phase),
                  residency::TieredExperts::scratch_bytes(shape, rows, phase));
}

}  // namespace dsfp4::model
