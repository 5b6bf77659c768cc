// Runs the chosen experts of a MoE layer, wherever they are, a bounded group at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "memory/arena.h"
#include "ops/host_routing.h"
#include "ops/ops.h"
#include "residency/read_ahead.h"

namespace dsfp4::residency {

/// One MoE layer of one step: y[t] = shared(x[t]) + sum over k of routing.weights[t, k] *
/// expert(routing.used[t, k])(x[t]): over slots, ascending, in decode; in prefill by the experts'
/// numbers, ascending, each added as soon as it is computed.
struct ExpertLayer {
  std::int64_t layer = 0;  // the model's number
  ops::Phase phase = ops::Phase::kPrefill;
  ops::ConstMatrix x;        // [tokens, hidden_size]
  ops::Routing routing;      // [tokens, top_k]
  ops::HostRouting on_host;  // the same, where the runner needs_host()
  std::int64_t top_k = 0;
  /// [tokens, hidden_size]; in a prefill, the experts' results are added to it.
  ops::Matrix y;
  /// Null: the model has none, or this is a prefill, which has added its results. Read in start()
  /// only.
  const ops::ExpertView* shared = nullptr;
};

/// A layer's experts under way. It may be left at any time: destruction gives back pins and
/// scratch.
class ExpertWork {
 public:
  virtual ~ExpertWork() = default;
  ExpertWork(const ExpertWork&) = delete;
  ExpertWork& operator=(const ExpertWork&) = delete;

  /// Computes one group of experts, or waits for one to arrive, for kPollPeriod at most. False:
  /// y is complete. Throws IoError and CheckpointError of experts that cannot be had,
  /// and what a device throws; the work is
  /// to be destroyed then.
  virtual bool advance() = 0;

 protected:
  ExpertWork() = default;
};

/// The sizes of a MoE layer.
struct MoeShape {
  std::int64_t hidden_size = 0;
  std::int64_t moe_intermediate_size = 0;
  std::int64_t shared_intermediate_size = 0;  // 0: no shared experts
  ops::RouterSpec router;
};

/// Serves one thread at a time, and any number of steps that take turns.
class ExpertRunner {
 public:
  virtual ~ExpertRunner() = default;

  /// Whether start() must know the choice on the host. Else it only queues ops, and its work is
  /// over at once.
  virtual bool needs_host(ops::Phase phase) const = 0;
  /// True where it must know x there, too, in a step of so many rows.
  virtual bool needs_x(std::int64_t rows) const {
    static_cast<void>(rows);
    return false;
  }
  /// A step of `rows` tokens begins: time to read what its first MoE layer is sure to need.
  virtual void begin_step(ops::Phase phase, std::int64_t rows, ReadAhead& ahead) {
    static_cast<void>(phase), static_cast<void>(rows), static_cast<void>(ahead);
  }

  /// Submits the reads of what is missing and computes the shared expert. x, routing, y, `arena`
  /// and `ahead`, which is the step's, must outlive the work; nothing else may take from `arena`
  /// meanwhile.
  virtual std::unique_ptr<ExpertWork> start(const ExpertLayer& layer, memory::Arena& arena,
                                            ReadAhead& ahead) = 0;

  /// A step has thrown, wherever it was: what a device was still to do for it may not have been
  /// done. Its work is gone by now.
  virtual void after_error() noexcept {}
};

}  // namespace dsfp4::residency
