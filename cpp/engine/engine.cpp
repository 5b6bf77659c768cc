#include "engine/engine.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <utility>

#include "base/log.h"
#include "dsfp4/error.h"
#include "engine/context.h"
#include "engine/kept_rates.h"
#include "engine/options.h"
#include "engine/prompt.h"
#include "engine/quantization.h"
#include "engine/sampler.h"
#include "memory/source.h"

namespace dsfp4::engine {
namespace {

// In bytes; 0 is no limit, and however small a given one is, it is one.
std::uint64_t vram_limit(double gigabytes) {
  if (gigabytes == 0.0) return 0;
  return std::max<std::uint64_t>(1, static_cast<std::uint64_t>(gigabytes * 1e9));
}

std::unique_ptr<ops::Ops> make_ops(const LoadOptions& options) {
  const std::string& device = options.device;
  const int threads = thread_count(options.threads);
  constexpr double kMostGigabytes = 1e6;
  if (!(options.memory_limit >= 0.0 && options.memory_limit <= kMostGigabytes)) {
    throw ParameterError("memory_limit", "must be over 0 and at most 1000000 GB of VRAM");
  }
  if (device == "cuda") {
    return ops::make_cuda_ops(0, vram_limit(options.memory_limit));
  }
  if (options.memory_limit != 0.0) {
    throw ParameterError("memory_limit", "limits VRAM, and device '" + device + "' uses none");
  }
  if (device == "cpu") return ops::make_cpu_ops(threads);
  if (device == "reference") return ops::make_reference_ops(threads);
  throw ParameterError("device", "'" + device + "' is not one of cpu, cuda, reference");
}

// The processor's, beside a GPU's.
std::unique_ptr<ops::Ops> make_host_ops(const LoadOptions& options) {
  const int threads = thread_count(options.threads);
  return options.device == "reference" ? ops::make_reference_ops(threads)
                                       : ops::make_cpu_ops(threads);
}

// That a model may take of RAM.
std::uint64_t ram_for(const LoadOptions& options, const Machine& machine) {
  return options.ram_limit > 0 ? options.ram_limit : memory::default_ram_limit(machine.memory());
}

Poll polling(const KeepGoing& keep_going) {
  if (!keep_going) return {};
  return [&keep_going] {
    if (!keep_going()) throw CancelledError();
  };
}

// Adds the seconds of a scope to a number, however the scope is left.
class Stopwatch {
 public:
  explicit Stopwatch(double& seconds) : seconds_(seconds) {}
  ~Stopwatch() {
    seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  double& seconds_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace

Engine::Engine(const std::filesystem::path& folder, const LoadOptions& options,
               const Machine& machine)
    : config_(checkpoint::read_config(folder)),
      max_context_(context_limit(options.max_context, config_.max_position_embeddings)),
      trace_(options.trace_file.empty() ? nullptr : std::make_unique<Trace>(options.trace_file)),
      ops_(machine.make_ops ? machine.make_ops() : make_ops(options)),
      kv_format_(kv_format(options.kv_cache_dtype, ops_->default_kv_format())),
      spec_(model::make_spec(config_)),
      loaded_(load_weights(
          folder, config_, ops_->device(),
          {.reader = machine.reading,
           .threads = thread_count(options.threads),
           .progress = options.progress,
           .poll = polling(options.keep_going),
           .formats = formats_to_choose(options, !ops_->device().host_visible()),
           .plan = [&](const WeightSizes& sizes) { return plan(options, machine, sizes); }})),
      rates_(known_rates({spec_, *ops_, host_ops_.get()}, loaded_, planned_->plan(), options,
                         thread_count(options.threads), machine.rate_limits,
                         polling(options.keep_going))),
      device_trace_(residency::DeviceTrace::make(
          trace_.get(), ops_->device(),
          {.first_layer = spec_.dense_layers, .per_layer = spec_.router.experts})),
      tiers_(*ops_, host_ops_.get(), spec_, loaded_, *planned_, rates_, options,
             {trace_.get(), device_trace_.get()}),
      embedding_(planned_->plan().embedding_in_ram
                     ? std::make_unique<model::HostEmbedding>(*host_ops_, spec_.hidden_size)
                     : nullptr),
      decoder_(spec_, loaded_.weights, *ops_, tiers_.runner(), tiers_.layers(), embedding_.get(),
               kv_format_, device_trace_.get()),
      shared_only_(*ops_),
      dense_decoder_(spec_, loaded_.weights, *ops_, shared_only_, tiers_.layers(), embedding_.get(),
                     kv_format_),
      scratch_(scratch_bytes(spec_, prefill_chunk_), "the activations", ops_->device().memory()),
      logits_(logit_bytes(spec_, ops_->device().host_visible()), "the logits",
              ops_->device().memory()),
      routings_(ops_->device(), prefill_chunk_, spec_.router, spec_.hidden_size),
      cache_(max_context_, spec_.layers, model::kv_layer_bytes(spec_, kv_format_), kv_format_,
             ops_->device().memory()) {
  if (!tiers_.tiered()) {
    for (const model::LayerWeights& layer : loaded_.weights.layers) {
      ops_->prepare_experts(layer.experts);
    }
  }
  ops_->reserve(largest_step(running(), loaded_.sizes, prefill_chunk_));
  if (host_ops_) host_ops_->reserve(largest_host_step(running(), loaded_.sizes));
  planned_->loaded();
}

Engine::~Engine() {
  try {
    ops_->device().synchronize();
  } catch (const std::exception& error) {  // it computes nothing any more
    log(LogLevel::kInfo, error.what());
  }
}

void Engine::head(ops::ConstMatrix hidden, model::Phase phase, float* logits) {
  const std::int64_t vocab = spec().vocab_size;
  if (ops_->device().host_visible()) {
    decoder_.head(hidden, {logits, hidden.rows, vocab, vocab}, phase);
    return;
  }
  const ops::ScratchScope scope(logits_);
  const ops::Matrix there = ops::scratch_matrix(logits_, kLogitRows, vocab);
  for (std::int64_t at = 0; at < hidden.rows; at += kLogitRows) {
    const std::int64_t rows = std::min(kLogitRows, hidden.rows - at);
    decoder_.head(hidden.slice(at, rows), there.slice(0, rows), phase);
    ops_->device().download(there.data, logits + at * vocab,
                            static_cast<std::size_t>(rows * vocab) * sizeof(float));
  }
}

void Engine::make_planned(const LoadOptions& options, const Machine& machine,
                          const WeightSizes& sizes, std::optional<std::uint64_t> vram) {
  const auto make = [&](std::int64_t context) {
    max_context_ = context;
    planned_ = std::make_unique<Planned>(model_bytes(running(), sizes), options, max_context_,
                                         machine, vram);
  };
  if (options.max_context != 0) {
    make(max_context_);
    return;
  }
  const std::int64_t most = max_context_;
  const std::size_t block =
      KvCache::block_bytes(spec_.layers, model::kv_layer_bytes(spec_, kv_format_));
  plan_with_context(most, block, vram ? *vram : ram_for(options, machine), make);
  if (max_context_ == most) return;
  log(LogLevel::kInfo, "max_context is " + std::to_string(max_context_) + " tokens of the " +
                           std::to_string(most) +
                           " that the model could, as their cache takes memory: give max_context "
                           "for more");
}

residency::Plan Engine::plan(const LoadOptions& options, const Machine& machine,
                             const WeightSizes& sizes) {
  const bool in_ram = ops_->device().host_visible();
  std::optional<std::uint64_t> vram;
  if (!in_ram) vram = shared_out(ops_->device().memory().available());
  if (!in_ram && spec_.moe_layers() > 0) host_ops_ = make_host_ops(options);
  make_planned(options, machine, sizes, vram);
  residency::Plan plan = planned_->plan();
  prefill_chunk_ = plan.chunk;
  if (!plan.tiered) host_ops_.reset();
  for (const std::string& warning : plan.warnings) log(LogLevel::kWarning, warning);
  log_conversion(plan, sizes);
  const char* why = in_ram ? memory::why_no_huge_pages() : "";
  if (*why != '\0') log(LogLevel::kInfo, why);
  return plan;
}

template <typename Change>
void Engine::change(const KeepGoing& keep_going, const Change& change) {
  const Turns::Turn turn(turns_, keep_going);
  if (!turn.came()) throw CancelledError();
  change();
}

void Engine::set_memory_config(const MemoryConfig& config, const KeepGoing& keep_going) {
  change(keep_going, [&] { tiers_.configure(config); });
}

void Engine::set_memory_strategy(const MemoryStrategy& strategy, const KeepGoing& keep_going) {
  change(keep_going, [&] { tiers_.place(strategy, polling(keep_going)); });
}

void Engine::set_compute_streams(const ComputeStreams& streams, const KeepGoing& keep_going) {
  change(keep_going, [&] { tiers_.overlap(streams); });
}

void Engine::check_ids(std::span<const std::int32_t> ids, const char* parameter) const {
  if (ids.empty()) throw ParameterError(parameter, "must hold at least one token id");
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= spec().vocab_size) {
      throw ParameterError(parameter, "token id " + std::to_string(ids[i]) + " at position " +
                                          std::to_string(i) + " is outside the vocabulary of " +
                                          std::to_string(spec().vocab_size));
    }
  }
  const auto count = static_cast<std::int64_t>(ids.size());
  if (count > max_context_) throw ContextLengthError(count, max_context_);
}

template <typename Use>
bool Engine::step(const model::Decoder& decoder, Sequence& sequence, model::Batch batch,
                  const KeepGoing& keep_going, const Use& use) {
  const auto rows = static_cast<std::int64_t>(batch.ids.size());
  const ops::SequenceRows part = sequence.next_rows(0, rows);
  batch.sequences = {&part, 1};
  const auto start = Trace::Clock::now();
  try {
    model::Pass pass(decoder, batch, scratch_, routings_);
    while (!pass.done()) {
      if (keep_going && !keep_going()) return false;
      pass.advance();
    }
    use(pass.hidden());
  } catch (...) {
    tiers_.after_error();
    throw;
  }
  sequence.advance(rows);
  if (trace_ == nullptr) return true;
  if (device_trace_ != nullptr) device_trace_->poll();
  const char* phase = batch.phase == model::Phase::kPrefill ? "prefill " : "decode ";
  trace_->span(Trace::Track::kSteps,
               phase + std::to_string(rows) + " at " + std::to_string(part.position), start,
               Trace::Clock::now());
  return true;
}

void Engine::forward(std::span<const std::int32_t> ids, std::span<float> logits,
                     const ForwardOptions& options) {
  check_ids(ids, "ids");
  const auto count = static_cast<std::int64_t>(ids.size());
  const auto pairs = static_cast<std::size_t>(spec().moe_layers() * count * spec().router.top_k);
  const auto vocab = static_cast<std::size_t>(spec().vocab_size);
  if (!logits.empty() && (options.on_logits || logits.size() != ids.size() * vocab)) {
    throw ParameterError("logits", options.on_logits
                                       ? "must be empty, as on_logits receives them"
                                       : "must hold vocab_size values for each token");
  }
  std::vector<float> window(options.on_logits ? static_cast<std::size_t>(kLogitRows) * vocab : 0);
  if (!options.forced_experts.empty() && options.forced_experts.size() != pairs) {
    throw ParameterError("experts", "must be [moe_layers, tokens, num_experts_per_tok], " +
                                        std::to_string(pairs) + " in all, not " +
                                        std::to_string(options.forced_experts.size()));
  }
  if (!options.chosen_experts.empty() && options.chosen_experts.size() != pairs) {
    throw ParameterError("chosen_experts", "must be [moe_layers, tokens, num_experts_per_tok]");
  }
  const std::int64_t logits_stride = count * spec().router.experts;
  if (!options.router_logits.empty() &&
      options.router_logits.size() !=
          static_cast<std::size_t>(spec().moe_layers() * logits_stride)) {
    throw ParameterError("router_logits", "must be [moe_layers, tokens, experts]");
  }
  if (!options.routed_experts && !tiers_.tiered()) {
    // Their recorded steps have the routed experts in them.
    throw ParameterError("routed_experts",
                         "can be left out only of a model whose experts are not all in memory");
  }
  const model::Decoder& decoder = options.routed_experts ? decoder_ : dense_decoder_;

  const Turns::Turn turn(turns_, options.keep_going);
  if (!turn.came()) throw CancelledError();
  Sequence sequence(cache_);
  const std::int64_t chunk = options.decode ? 1 : piece_rows(count, prefill_chunk_);
  for (std::int64_t at = 0; at < count; at += chunk) {
    const std::int64_t rows = std::min(chunk, count - at);
    const auto first_pair = static_cast<std::size_t>(at * spec().router.top_k);
    model::Batch batch;
    batch.phase = options.decode ? model::Phase::kDecode : model::Phase::kPrefill;
    batch.ids = ids.subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(rows));
    if (!options.forced_experts.empty()) {
      batch.forced_experts = options.forced_experts.data() + first_pair;
    }
    if (!options.chosen_experts.empty()) {
      batch.chosen_experts = options.chosen_experts.data() + first_pair;
    }
    batch.expert_layer_stride = count * spec().router.top_k;
    if (!options.router_logits.empty()) {
      batch.router_logits = options.router_logits.data() + at * spec().router.experts;
      batch.logits_layer_stride = logits_stride;
    }
    const bool ran =
        step(decoder, sequence, batch, options.keep_going, [&](ops::ConstMatrix hidden) {
          if (!logits.empty()) head(hidden, batch.phase, logits.data() + at * spec().vocab_size);
          for (std::int64_t row = 0; options.on_logits && row < rows; row += kLogitRows) {
            const std::int64_t some = std::min(kLogitRows, rows - row);
            head(hidden.slice(row, some), batch.phase, window.data());
            options.on_logits(at + row, {window.data(), static_cast<std::size_t>(some) * vocab});
          }
        });
    if (!ran) throw CancelledError();
  }
}

bool Engine::last_logits(Sequence& sequence, model::Phase phase, std::span<const std::int32_t> ids,
                         const KeepGoing& keep_going, std::span<float> logits,
                         const std::optional<ops::SampleSpec>& draw,
                         std::optional<std::int32_t>& sampled) {
  model::Batch batch;
  batch.phase = phase;
  batch.ids = ids;
  sampled.reset();
  const bool ran = step(decoder_, sequence, batch, keep_going, [&](ops::Matrix hidden) {
    const ops::Matrix last = hidden.slice(hidden.rows - 1, 1);
    if (draw) {
      const ops::ScratchScope scope(logits_);
      const ops::Matrix there = ops::scratch_matrix(logits_, 1, spec().vocab_size);
      decoder_.head(last, there, phase);
      sampled = ops_->sample(there, *draw);
    }
    if (!sampled) head(last, phase, logits.data());
  });
  if (sampled && *sampled < 0) throw Error("no token can be chosen: every logit is NaN");
  return ran;
}

GenerationResult Engine::generate(std::span<const std::int32_t> prompt,
                                  const GenerateOptions& options, const TokenCallback& on_token) {
  check_options(options, spec().vocab_size);
  check_ids(prompt, "prompt");
  const auto prompt_tokens = static_cast<std::int64_t>(prompt.size());
  if (prompt_tokens + 1 > max_context_) throw ContextLengthError(prompt_tokens + 1, max_context_);

  GenerationResult result;
  result.prompt_tokens = prompt_tokens;
  result.finish_reason = FinishReason::kCancelled;
  {
    const Turns::Turn turn(turns_, prefill_going(options, 0, prompt_tokens));
    if (!turn.came()) return result;
    Sequence sequence(cache_);
    std::vector<float> logits(static_cast<std::size_t>(spec().vocab_size));
    {
      const Stopwatch watch(result.prefill_seconds);
      if (!prefill(sequence, prompt, options, logits)) return result;
    }
    const Stopwatch watch(result.decode_seconds);
    decode(sequence, prompt, options, on_token, logits, result);
  }
  tiers_.remember();  // the turn is over, and the clocks have stopped
  return result;
}

bool Engine::prefill(Sequence& sequence, std::span<const std::int32_t> prompt,
                     const GenerateOptions& options, std::span<float> logits) {
  const auto total = static_cast<std::int64_t>(prompt.size());
  const std::int64_t piece = piece_rows(total, prefill_chunk_);
  std::optional<std::int32_t> sampled;  // never, without a draw
  for (std::int64_t at = 0; at < total;) {
    const std::int64_t rows = std::min(piece, total - at);
    const auto ids = prompt.subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(rows));
    if (!last_logits(sequence, model::Phase::kPrefill, ids, prefill_going(options, at, total),
                     logits, {}, sampled)) {
      return false;
    }
    at += rows;
    if (!prefill_going(options, at, total)()) return false;
  }
  return true;
}

void Engine::decode(Sequence& sequence, std::span<const std::int32_t> prompt,
                    const GenerateOptions& options, const TokenCallback& on_token,
                    std::span<float> logits, GenerationResult& result) {
  std::vector<std::int32_t> stop_ids(config().eos_token_ids.begin(), config().eos_token_ids.end());
  if (options.stop_ids) stop_ids = *options.stop_ids;
  Sampler sampler(options, prompt, spec().vocab_size);
  const std::int64_t most = std::min(options.max_tokens, max_context_ - result.prompt_tokens);
  std::optional<std::int32_t> sampled;  // where the ops do it; then `logits` are not filled
  for (;;) {
    const std::int32_t token = sampled ? *sampled : sampler.sample(logits);
    if (std::ranges::find(stop_ids, token) != stop_ids.end()) {
      result.finish_reason = FinishReason::kStop;
      return;
    }
    result.tokens.push_back(token);
    if (options.logprobs > 0) {
      result.logprobs.push_back(token_logprobs(logits, token, options.logprobs));
    }
    if (on_token && !on_token(token)) {
      result.finish_reason = FinishReason::kCancelled;
      return;
    }
    if (static_cast<std::int64_t>(result.tokens.size()) >= most) {
      result.finish_reason = FinishReason::kLength;
      return;
    }
    const std::optional<ops::SampleSpec> draw =
        ops_->device().host_visible() ? std::nullopt : sampler.draw();
    if (!last_logits(sequence, model::Phase::kDecode, {&token, 1}, options.keep_going, logits, draw,
                     sampled)) {
      result.finish_reason = FinishReason::kCancelled;
      return;
    }
  }
}

}  // namespace dsfp4::engine
