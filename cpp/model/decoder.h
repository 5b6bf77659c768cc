// The decoder: embedding, the stack of layers, the final norm and the head. A Pass goes through it.
#pragma once

#include <cstdint>
#include <span>

#include "model/layers.h"
#include "model/spec.h"
#include "model/weights.h"
#include "ops/ops.h"
#include "residency/dense_layers.h"
#include "residency/device_trace.h"
#include "residency/expert_runner.h"

namespace dsfp4::model {

/// Rows of a prefill that go through the dense part of a layer together: enough that reading the
/// layer's weights once more for each piece costs little beside the products.
constexpr std::int64_t kDenseRows = 1024;

/// One step of the model: some tokens of one or more sequences.
struct Batch {
  Phase phase = Phase::kPrefill;
  std::span<const std::int32_t> ids;  // [rows]
  std::span<const ops::SequenceRows>
      sequences;  // cover the rows; their kv.layer_offset and scale are set here
  /// Experts per MoE layer: layer l's rows begin l * expert_layer_stride entries in. May be null.
  const std::int32_t* forced_experts = nullptr;
  std::int32_t* chosen_experts = nullptr;
  std::int64_t expert_layer_stride = 0;
  /// Receives the routers' logits; layer l's rows begin l * logits_layer_stride in. May be null.
  float* router_logits = nullptr;
  std::int64_t logits_layer_stride = 0;
  /// 1 to kDenseRows; changes no bit.
  std::int64_t dense_rows = kDenseRows;
};

/// Arena bytes that a Pass of `rows` rows takes in that phase.
std::size_t scratch_bytes(const ModelSpec& spec, std::int64_t rows, Phase phase);
/// Bytes of one KV cache block in one layer; a block holds the layers one after the other.
std::size_t kv_layer_bytes(const ModelSpec& spec, ops::KvFormat format);

/// Looks tokens up in an embedding that lies in RAM, for a step whose activations do not.
class HostEmbedding {
 public:
  /// `host` computes in RAM and must outlive this. Throws MemoryLimitError.
  HostEmbedding(ops::Ops& host, std::int64_t hidden_size);
  /// Bytes of RAM that it takes.
  static std::size_t bytes(std::int64_t hidden_size);
  /// x [ids, hidden] = the rows of `table`, before the ops of `device` that follow.
  void embed(const WeightView& table, std::span<const std::int32_t> ids, ops::Device& device,
             ops::Matrix x);

 private:
  ops::Ops& host_;
  memory::Arena arena_;
  ops::Matrix rows_;
};

class Decoder {
 public:
  /// The weights, the ops, the experts, `streamed` (null where all layers' dense weights are in
  /// memory), `embedding` (null where the ops can reach it) and `trace` (null: none was asked for)
  /// must outlive the decoder.
  Decoder(ModelSpec spec, const ModelWeights& weights, ops::Ops& ops,
          residency::ExpertRunner& experts, residency::DenseLayers* streamed,
          HostEmbedding* embedding, ops::KvFormat kv_format,
          residency::DeviceTrace* trace = nullptr)
      : spec_(std::move(spec)),
        weights_(weights),
        ops_(ops),
        experts_(experts),
        streamed_(streamed),
        embedding_(embedding),
        kv_format_(kv_format),
        trace_(trace) {}

  const ModelSpec& spec() const noexcept { return spec_; }

  /// logits [rows, vocab] = head(hidden), after a step of that phase.
  void head(ops::ConstMatrix hidden, ops::Matrix logits, Phase phase) const;

 private:
  friend class Pass;  // a step through it

  ModelSpec spec_;
  const ModelWeights& weights_;
  ops::Ops& ops_;
  residency::ExpertRunner& experts_;
  residency::DenseLayers* streamed_;
  HostEmbedding* embedding_;
  ops::KvFormat kv_format_;
  residency::DeviceTrace* trace_;
};

}  // namespace dsfp4::model
