// One step on its way through the layers, a bounded piece at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "memory/arena.h"
#include "model/decoder.h"
#include "ops/backend.h"
#include "ops/scratch.h"
#include "residency/expert_runner.h"
#include "residency/layer_stream.h"
#include "residency/read_ahead.h"

namespace dsfp4::model {

/// Between two calls of advance() another pass may go on, with an arena of its own: this one then
/// holds no layer's dense weights, and never all slots of experts. It is left by destroying it,
/// which gives back everything it holds; what it wrote to the KV cache does not count.
class Pass {
 public:
  /// Nothing runs yet. The decoder and all that `batch` points to must outlive the pass. `arena` is
  /// the pass's own while it lives: scratch_bytes() from where it stands.
  Pass(const Decoder& decoder, const Batch& batch, memory::Arena& arena);
  Pass(const Pass&) = delete;
  Pass& operator=(const Pass&) = delete;

  bool done() const noexcept { return done_; }
  /// Runs one piece: a layer up to its experts, or one group of them. Waits for a layer or an
  /// expert for kPollPeriod at most. A step that the backend records is one piece. Throws what
  /// reads of weights throw (IoError, CheckpointError); the pass is to be destroyed then.
  void advance();
  /// Once done(): the normed hidden states [rows, hidden]; they live as long as the pass. The
  /// tokens' latents are in the KV cache then.
  ops::Matrix hidden() const noexcept { return x_; }

 private:
  ops::Backend::StepRecording begin();
  void embed();
  void piece();
  void run_layer();
  void end_layer();
  ExpertChoice expert_choice() const;

  const Decoder& decoder_;
  const Batch batch_;
  std::vector<ops::SequenceRows> sequences_;
  // From here on in the order of taking: destruction gives back in the reverse one.
  const ops::ScratchScope scope_;
  memory::Arena& arena_;
  ops::Matrix x_, normed_, block_, cos_sin_;  // x_ is the residual stream
  residency::ReadAhead ahead_;
  std::optional<ops::ScratchScope> layer_scope_;
  std::optional<residency::LayerStream::Use> use_;  // a layer that is waited for
  std::unique_ptr<residency::ExpertWork> work_;     // of the layer; null: it has yet to run
  std::int64_t layer_ = 0;
  bool begun_ = false;
  bool done_ = false;
};

}  // namespace dsfp4::model
