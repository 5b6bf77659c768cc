// Runs sequences through the decoder: prefill in chunks, decode token by token, sample.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/trace.h"
#include "checkpoint/config.h"
#include "dsfp4/model.h"
#include "dsfp4/rates.h"
#include "engine/kv_cache.h"
#include "engine/loader.h"
#include "engine/model_bytes.h"
#include "engine/planned.h"
#include "engine/tiers.h"
#include "engine/turns.h"
#include "memory/arena.h"
#include "model/decoder.h"
#include "model/pass.h"
#include "ops/ops.h"
#include "residency/device_trace.h"
#include "residency/shared_experts.h"

namespace dsfp4::engine {

class Engine {
 public:
  Engine(const std::filesystem::path& folder, const LoadOptions& options)
      : Engine(folder, options, {reader_options(options)}) {}
  /// On a machine of its own kind, for tests.
  Engine(const std::filesystem::path& folder, const LoadOptions& options, const Machine& machine);

  /// Waits for what a device still computes, as it reads what goes next.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  const checkpoint::ModelConfig& config() const noexcept { return config_; }
  const model::ModelSpec& spec() const noexcept { return spec_; }
  std::int64_t max_context() const noexcept { return max_context_; }
  std::uint64_t weight_bytes() const noexcept { return loaded_.weight_bytes; }

  void forward(std::span<const std::int32_t> ids, std::span<float> logits,
               const ForwardOptions& options);
  GenerationResult generate(std::span<const std::int32_t> prompt, const GenerateOptions& options,
                            const TokenCallback& on_token);
  void set_memory_config(const MemoryConfig& config, const KeepGoing& keep_going = {});
  void set_compute_streams(const ComputeStreams& streams, const KeepGoing& keep_going = {});
  void set_memory_strategy(const MemoryStrategy& strategy, const KeepGoing& keep_going = {});
  ModelStats stats() const { return tiers_.stats(); }

 private:
  /// Decides where the weights go, reserves the memory and logs what is to be said about it.
  residency::Plan plan(const LoadOptions& options, const Machine& machine,
                       const WeightSizes& sizes);
  /// Plans, with a context that memory can be asked to spare where the user named none.
  void make_planned(const LoadOptions& options, const Machine& machine, const WeightSizes& sizes,
                    std::optional<std::uint64_t> vram);
  /// Makes a change in its turn.
  template <typename Change>
  void change(const KeepGoing& keep_going, const Change& change);
  Running running() const {
    std::optional<Backend> host;
    if (host_ops_) host = backend_of(*host_ops_);
    return {spec_, backend_of(*ops_), std::move(host), kv_format_, max_context_};
  }
  /// Runs the batch's ids as the sequence's next tokens, and `use` with the pass that is done.
  /// False: `keep_going`, asked before each piece of it, said no, and `use` was not called.
  template <typename Use>
  bool step(const model::Decoder& decoder, Sequence& sequence, model::Batch batch,
            const KeepGoing& keep_going, const Use& use);
  /// Runs the prompt. False: it was cancelled.
  bool prefill(Sequence& sequence, std::span<const std::int32_t> prompt,
               const GenerateOptions& options, std::span<float> logits);
  /// Samples and decodes until something ends it; fills the tokens and the finish reason.
  void decode(Sequence& sequence, std::span<const std::int32_t> prompt,
              const GenerateOptions& options, const TokenCallback& on_token,
              std::span<float> logits, GenerationResult& result);
  /// Logits of the last of `ids`, which become the sequence's next tokens; or, given a draw and ops
  /// that sample, `sampled`, the token that follows, without logits. False as step().
  bool last_logits(Sequence& sequence, model::Phase phase, std::span<const std::int32_t> ids,
                   const KeepGoing& keep_going, std::span<float> logits,
                   const std::optional<ops::SampleSpec>& draw,
                   std::optional<std::int32_t>& sampled);
  /// logits (on the host) = head(hidden), after a step of that phase.
  void head(ops::ConstMatrix hidden, model::Phase phase, float* logits);
  void check_ids(std::span<const std::int32_t> ids, const char* parameter) const;

  checkpoint::ModelConfig config_;
  std::int64_t max_context_;
  std::unique_ptr<Trace> trace_;  // null: none was asked for
  std::unique_ptr<ops::Ops> ops_;
  std::unique_ptr<ops::Ops> host_ops_;  // beside those of a GPU that does not hold everything
  ops::KvFormat kv_format_;
  model::ModelSpec spec_;
  std::unique_ptr<Planned> planned_;  // once the headers have been read
  std::int64_t prefill_chunk_ = 0;
  LoadedWeights loaded_;
  Rates rates_;
  std::unique_ptr<residency::DeviceTrace> device_trace_;  // of a GPU's part of trace_
  Tiers tiers_;
  std::unique_ptr<model::HostEmbedding> embedding_;  // null: the ops reach it
  model::Decoder decoder_;
  residency::SharedExperts shared_only_;
  model::Decoder dense_decoder_;  // leaves the routed experts out
  memory::Arena scratch_;
  memory::Arena logits_;  // where the device's memory is not the host's
  ops::RoutingReader routings_;
  KvCache cache_;
  Turns turns_;
};

}  // namespace dsfp4::engine
