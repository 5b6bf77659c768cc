// Runs the chosen experts of a MoE layer, wherever they are.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/poll.h"
#include "memory/arena.h"
#include "ops/backend.h"

namespace dsfp4::residency {

/// The sizes of a MoE layer.
struct MoeShape {
  std::int64_t hidden_size = 0;
  std::int64_t moe_intermediate_size = 0;
  std::int64_t shared_intermediate_size = 0;  // 0: no shared experts
  std::int64_t experts = 0;
  std::int64_t top_k = 0;
};

/// Called once for each MoE layer of a step, from the thread that runs the step.
class ExpertRunner {
 public:
  virtual ~ExpertRunner() = default;

  /// A step of `rows` tokens begins: time to read what its first MoE layer is sure to need.
  virtual void begin_step(std::int64_t rows) { static_cast<void>(rows); }

  /// y[t] = shared(x[t]) + sum over slots k, ascending, of routing.weights[t, k] *
  /// expert(routing.used[t, k])(x[t]) with the experts of model layer `layer`; `shared` may be
  /// null. x and y are [tokens, hidden_size]; `routing` is [tokens, top_k]; scratch comes from
  /// `arena` and is given back. `poll` is asked between groups of experts and in waits.
  virtual void run(std::int64_t layer, ops::ConstMatrix x, const ops::Routing& routing,
                   std::int64_t top_k, memory::Arena& arena, ops::Matrix y,
                   const ops::ExpertView* shared, const Poll& poll) = 0;
};

}  // namespace dsfp4::residency
