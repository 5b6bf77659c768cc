// One step on its way through the layers, a bounded piece at a time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "memory/arena.h"
#include "model/decoder.h"
#include "ops/host_routing.h"
#include "ops/ops.h"
#include "ops/scratch.h"
#include "residency/expert_runner.h"
#include "residency/layer_stream.h"
#include "residency/read_ahead.h"

namespace dsfp4::model {

/// Between two calls of advance() another pass may go on, with an arena of its own: this one then
/// holds dense weights only as LayerStream keeps them for steps that take turns, and never all
/// slots of experts. It is left by destroying it,
/// which gives back everything it holds; what it wrote to the KV cache does not count.
class Pass {
 public:
  /// Nothing runs yet. The decoder and all that `batch` points to must outlive the pass. `arena`
  /// and `routings` are the pass's own while it lives; it takes scratch_bytes() from where the
  /// arena stands. Decode steps of one size must find it at the same place, as they may be
  /// recorded.
  Pass(const Decoder& decoder, const Batch& batch, memory::Arena& arena,
       ops::RoutingReader& routings);
  Pass(const Pass&) = delete;
  Pass& operator=(const Pass&) = delete;

  bool done() const noexcept { return done_; }
  /// Runs one piece: the dense part of a layer, in a prefill for Batch::dense_rows rows at most, or
  /// one group of its experts. Waits for a layer or an expert for kPollPeriod at most. A decode
  /// step in which the host has no part is one piece. Throws what reads of weights throw (IoError,
  /// CheckpointError); the pass is to be destroyed then.
  void advance();
  /// Once done(): the normed hidden states [rows, hidden]; they live as long as the pass. The
  /// tokens' latents are in the KV cache then.
  ops::Matrix hidden() const noexcept { return x_; }

 private:
  /// True if something is to be waited for between layers.
  bool in_pieces() const;
  bool host_takes_part() const;
  void embed();
  void piece();
  void run_layer();
  void begin_layer(const LayerWeights& weights);
  void run_ops(const std::function<void()>& body);
  void dense_part(const LayerWeights& weights, std::int64_t first, std::int64_t rows);
  void start_experts(const LayerWeights& weights);
  void end_layer();
  std::vector<ops::SequenceRows> sequences_of(std::int64_t first, std::int64_t rows) const;
  ops::Routing routing_of(std::int64_t first, std::int64_t rows) const;
  std::int64_t rows_at_once(std::int64_t rows) const;
  std::span<const std::int32_t> forced_experts(std::int64_t first, std::int64_t rows) const;
  void tell_choice(const ops::HostRouting& routing) const;

  const Decoder& decoder_;
  const Batch batch_;
  std::vector<ops::SequenceRows> sequences_;
  ops::RoutingReader& routings_;
  // From here on in the order of taking: destruction gives back in the reverse one.
  const ops::ScratchScope scope_;
  memory::Arena& arena_;
  ops::Matrix x_, normed_, block_, cos_sin_;  // x_ is the residual stream
  residency::ReadAhead ahead_;
  std::optional<ops::ScratchScope> layer_scope_;
  ops::Routing routing_;                            // of the layer
  std::optional<residency::DenseLayers::Use> use_;  // until the layer's dense part is done
  std::unique_ptr<residency::ExpertWork> work_;     // of the layer; null: it has yet to run
  std::int64_t layer_ = 0;
  std::int64_t dense_done_ = 0;  // rows that are through the dense part of the layer
  bool begun_ = false;
  bool in_segment_ = false;  // of the whole step
  bool done_ = false;
};

}  // namespace dsfp4::model
