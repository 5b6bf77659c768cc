// Runs the chosen experts of a MoE layer, wherever they are.
#pragma once

#include <cstddef>
#include <cstdint>

#include "memory/arena.h"
#include "ops/backend.h"

namespace dsfp4::residency {

/// Called once for each MoE layer of a step, from the thread that runs the step.
class ExpertRunner {
 public:
  virtual ~ExpertRunner() = default;

  /// y[t] += sum over slots k, ascending, of routing.weights[t, k] * expert(routing.used[t,
  /// k])(x[t]) with the experts of model layer `layer`. x and y are [tokens, hidden_size];
  /// `routing` is [tokens, top_k]; scratch comes from `arena` and is given back. `shared`, if not
  /// null and takes_shared() says so, is one more expert of every token: y[t] = shared(x[t]) + that
  /// sum.
  virtual void run(std::int64_t layer, ops::ConstMatrix x, const ops::Routing& routing,
                   std::int64_t top_k, memory::Arena& arena, ops::Matrix y,
                   const ops::ExpertView* shared) = 0;
  virtual bool takes_shared(std::int64_t layer, const ops::ExpertView& shared, std::int64_t tokens,
                            std::int64_t top_k) const {
    static_cast<void>(layer), static_cast<void>(shared);
    static_cast<void>(tokens), static_cast<void>(top_k);
    return false;
  }

  /// Arena bytes that run() takes for `tokens` tokens.
  virtual std::size_t scratch_bytes(std::int64_t tokens, std::int64_t top_k) const = 0;
};

}  // namespace dsfp4::residency
