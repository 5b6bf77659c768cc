// An ExpertRunner without routed experts: what is left of a token is its dense part. For measuring.
#pragma once

#include "residency/expert_runner.h"

namespace dsfp4::residency {

/// Only queues ops: y[t] = shared(x[t]), or 0 where the model has no shared expert.
class SharedExperts final : public ExpertRunner {
 public:
  /// The ops must outlive this.
  explicit SharedExperts(ops::Ops& ops) : ops_(ops) {}

  bool needs_host(ops::Phase /*phase*/) const override { return false; }
  std::unique_ptr<ExpertWork> start(const ExpertLayer& layer, memory::Arena& arena,
                                    ReadAhead& ahead) override;

 private:
  ops::Ops& ops_;
};

}  // namespace dsfp4::residency
