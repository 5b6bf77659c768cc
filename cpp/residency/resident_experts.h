// The simplest ExpertRunner: every expert lies in the memory of the ops' device.
#pragma once

#include <functional>
#include <span>

#include "residency/expert_runner.h"

namespace dsfp4::residency {

class ResidentExperts final : public ExpertRunner {
 public:
  /// `experts_of(layer)` gives the experts of a MoE layer; the views and the ops must outlive
  /// this.
  using ExpertsOf = std::function<std::span<const ops::ExpertView>(std::int64_t layer)>;

  ResidentExperts(ops::Ops& ops, std::int64_t hidden_size, std::int64_t moe_intermediate_size,
                  ExpertsOf experts_of)
      : ops_(ops),
        hidden_size_(hidden_size),
        moe_intermediate_size_(moe_intermediate_size),
        experts_of_(std::move(experts_of)) {}

  bool needs_host(ops::Phase phase) const override {
    return phase == ops::Phase::kPrefill || !ops_.has_routed_experts();
  }
  std::unique_ptr<ExpertWork> start(const ExpertLayer& layer, memory::Arena& arena,
                                    ReadAhead& ahead) override;
  /// Arena bytes that work takes for `tokens` tokens: pair_scratch_bytes(), or what is computed
  /// before if that takes more.
  static std::size_t scratch_bytes(const MoeShape& shape, std::int64_t tokens, ops::Phase phase);

 private:
  class Work;

  ops::Ops& ops_;
  std::int64_t hidden_size_;
  std::int64_t moe_intermediate_size_;
  ExpertsOf experts_of_;
};

}  // namespace dsfp4::residency
