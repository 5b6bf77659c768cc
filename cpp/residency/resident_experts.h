// The simplest ExpertRunner: every expert lies in the backend's memory.
#pragma once

#include <functional>
#include <span>

#include "residency/expert_runner.h"

namespace dsfp4::residency {

class ResidentExperts final : public ExpertRunner {
 public:
  /// `experts_of(layer)` gives the experts of a MoE layer; the views and the backend must outlive
  /// this.
  using ExpertsOf = std::function<std::span<const ops::ExpertView>(std::int64_t layer)>;

  ResidentExperts(ops::Backend& backend, std::int64_t hidden_size,
                  std::int64_t moe_intermediate_size, ExpertsOf experts_of)
      : backend_(backend),
        hidden_size_(hidden_size),
        moe_intermediate_size_(moe_intermediate_size),
        experts_of_(std::move(experts_of)) {}

  std::unique_ptr<ExpertWork> start(const ExpertLayer& layer, memory::Arena& arena,
                                    ReadAhead& ahead) override;
  /// Arena bytes that work takes for `tokens` tokens.
  static std::size_t scratch_bytes(const MoeShape& shape, std::int64_t tokens);

 private:
  class Work;

  ops::Backend& backend_;
  std::int64_t hidden_size_;
  std::int64_t moe_intermediate_size_;
  ExpertsOf experts_of_;
};

}  // namespace dsfp4::residency
