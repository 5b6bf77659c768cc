// The engine: load a checkpoint, run token ids through it, generate.
//
// Ownership: a Model owns its weights, caches and threads and gives them back when destroyed. It
// keeps nothing of what a call is given: spans, options and callbacks need to last only as long as
// the call. One that was moved from may be destroyed or assigned to, nothing else.
// Threads: all calls on one Model may come from several threads; they take turns, first come, first
// served. stats() and what is noexcept never wait. A Model must outlive the calls on it. Callbacks
// are called on the thread of the call that they were given to; they may call stats(), any other
// call on the same Model throws Error at once.
// Leaving: each call that may take long has a keep_going, so that no wait has to be sat out.
// Processes: after fork() a Model belongs to the parent. In the child its calls throw Error, and
// destroying it there gives nothing back.
// Errors: everything thrown is a dsfp4::Error (error.h), or what a callback threw; after an error
// the Model stays usable. Memory for small things that runs out is std::bad_alloc, as ever.
// Nothing is printed, and nothing ends the process; log.h has what there is to say.
// Units: bytes, tokens and seconds.
// Versions: api.h says which programs a library of another version runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "dsfp4/api.h"
#include "dsfp4/rates.h"

namespace dsfp4 {
inline namespace DSFP4_ABI_NAMESPACE {

/// Asked on the thread of a call between layers and groups of experts, and at least every 50 ms
/// while the call waits for its turn or for the SSD. False ends the call: generate() returns what
/// it has, with FinishReason::kCancelled; others throw CancelledError. Empty: always true.
using KeepGoing = std::function<bool()>;

/// How experts and layers that lie on the SSD are brought in. Exact, but for expert_threshold;
/// cpu_share may change the last bits.
struct MemoryConfig {
  /// How many MoE layers ahead experts are predicted and read while the SSD is idle; 0 (off) to 16.
  /// Not given: 1 where it is sure to pay, for a prompt, whose tokens need most experts between
  /// them, and while the cache has room; else 0. Dense weights that are streamed are read so many
  /// layers ahead, at least one; that number is taken when the model is loaded.
  std::optional<std::int64_t> prefetch_layers;
  /// An expert that would have to come from the SSD and has less than this share of its token's
  /// routing weight is left out, and the rest scaled to the original sum; 0 (exact) to 1.
  double expert_threshold = 0.0;
  /// Of a token's experts that lie in RAM beside a GPU, the share that the processor computes; the
  /// others are copied to the GPU. 0 to 1; not given: so that both end together, by measured rates.
  /// With 0 neither time nor the place of an expert can change the text.
  std::optional<double> cpu_share = std::nullopt;
};

/// Stages of a step that go on while others do. One that is switched off is waited for each time:
/// to find a fault, and to see what the overlap brings. The text is the same either way, beside a
/// GPU with cpu_share 0. A model that lies in one memory has nothing to switch off.
struct ComputeStreams {
  /// Reads. Off: nothing is read ahead, and a layer's routed experts are computed once all its
  /// reads are over.
  bool prefetch = true;
  /// A GPU's ops. Off: each group of experts has been computed before anything else goes on.
  bool compute = true;
  /// Copies between RAM and VRAM. Off: each one has been made before anything else goes on, and
  /// none is made ahead.
  bool transfer = true;
};

/// The use of RAM and VRAM. GB are 10^9 bytes. Nothing given: planned from what the machine has.
struct MemoryStrategy {
  /// GB of RAM for cached experts. A model whose experts all fit is loaded whole.
  std::optional<double> cpu_cache_size;
  /// GB of RAM for experts that are being read, or pass by the cache; at least one expert.
  std::optional<double> prefetch_size;
  /// Experts that may stay in VRAM, 0 (none) to 2^31 - 1; a few more pass through. Device "cuda"
  /// only, as the next. Not given: as many as fit.
  std::optional<std::int64_t> max_experts;
  /// GB of VRAM, within LoadOptions::memory_limit, that are left to others. Not given: as before,
  /// at first 0.
  std::optional<double> gpu_reserved;
  /// Layers whose dense weights stay in VRAM, at most and at least; 0 to 2^31 - 1. Those of the
  /// others, three at least, as fewer save nothing, lie in RAM and are copied for each step, while
  /// the layers before them compute. Not given: as many as fit stay. Taken when the model is
  /// loaded.
  std::optional<std::int64_t> max_gpu_layers = std::nullopt;
  std::optional<std::int64_t> min_layers = std::nullopt;
};

/// Counted since the model was loaded; bytes and seconds.
struct ModelStats {
  /// Bytes of this struct in the program, for the library (api.h). Leave it as it is.
  std::size_t struct_bytes = sizeof(ModelStats);
  std::uint64_t reserved_bytes = 0;  // planned in all: weights, caches, staging, KV cache, scratch
  bool tiered = false;               // experts lie on the SSD; if not, what follows of them is 0
  std::uint64_t slots = 0, cache_slots = 0, slot_bytes = 0;
  std::uint64_t image_bytes = 0;  // of an expert in its file
  std::uint64_t hits = 0;         // chosen experts that were in RAM
  std::uint64_t misses = 0;       // and those that had to be read
  std::uint64_t joined = 0;       // and those on their way already: for another, or from VRAM
  std::uint64_t prefetched = 0;   // and those that a prediction had read, or was reading
  std::uint64_t evictions = 0;
  std::uint64_t prefetched_bytes = 0;  // of those
  std::uint64_t demand_bytes = 0, speculative_bytes = 0;
  std::uint64_t wasted_bytes = 0;                    // read by prediction and given up unused
  std::uint64_t used_bytes = 0;                      // of experts computed with, wherever they were
  std::uint64_t skipped_pairs = 0, total_pairs = 0;  // (token, expert) left out by expert_threshold
  /// Experts predicted one layer ahead, how many of them were chosen, and how many were chosen in
  /// all in the layers that had a prediction.
  std::uint64_t predicted = 0, predicted_used = 0, predictable = 0;
  double wait_seconds = 0.0;          // with nothing left to compute but what was being read
  double expert_seconds = 0.0;        // computing experts
  std::uint64_t streamed_layers = 0;  // whose dense weights are brought in anew for each step
  std::uint64_t streamed_bytes = 0;   // of those, from the SSD, that steps computed with
  double stream_wait_seconds = 0.0;   // for those reads
  std::uint64_t reads = 0, read_bytes = 0, read_retries = 0, read_stalls = 0, reads_in_flight = 0;
  double ssd_busy_seconds = 0.0;  // with at least one read in flight
  // Of a model whose experts lie in VRAM, too:
  std::uint64_t device_slots = 0, device_cache_slots = 0, device_slot_bytes = 0;
  std::uint64_t device_hits = 0;  // chosen experts that VRAM keeps; not among `hits`
  std::uint64_t uploads = 0, uploaded_bytes = 0;  // of experts from RAM to VRAM
  std::uint64_t device_evictions = 0;
  std::uint64_t device_returns = 0;  // of those, copied back to RAM
  std::uint64_t uploads_ahead = 0;   // of `uploads`, predicted ones, before their layer was reached
  std::uint64_t uploads_ahead_used = 0;  // those that were then chosen; not among `hits`
  std::uint64_t cpu_bytes = 0;           // of experts that the processor computed
  double cpu_seconds = 0.0;
  std::uint64_t layer_upload_bytes = 0;    // of streamed_layers, from RAM to VRAM
  double layer_upload_wait_seconds = 0.0;  // in which the GPU waited for those copies
  Rates rates;                             // of the machine, measured before; 0: not known
};

struct LoadOptions {
  /// Bytes of this struct in the program, for the library (api.h). Leave it as it is.
  std::size_t struct_bytes = sizeof(LoadOptions);
  /// "cpu" (SIMD), "cuda" (an NVIDIA GPU; its memory must hold the KV cache, the head, a step and
  /// the dense weights of a few layers) or "reference" (scalar, FP32 with FP64 sums; for checking,
  /// slow).
  std::string device = "cpu";
  /// Compute threads, 1 to 1024; 0 means one for each core that the process may use, fewer where a
  /// CPU quota is less.
  int threads = 0;
  /// Longest sequence in tokens, prompt and answer together, 1 to the model's
  /// max_position_embeddings; 0 means that, or the largest power of two from 4096 on whose KV cache
  /// takes at most an eighth of the memory that holds it.
  std::int64_t max_context = 0;
  /// How the KV cache keeps latents: "bf16", or "fp8" (E4M3, half the memory, an error of about 3 %
  /// a value). The reference device computes with an FP32 cache where this says "bf16".
  std::string kv_cache_dtype = "bf16";
  /// GB (10^9 bytes) of VRAM that the process may take, the CUDA context included; over 0, or 0 for
  /// what is free. Device "cuda" only.
  double memory_limit = 0.0;
  MemoryConfig memory;
  MemoryStrategy strategy;
  /// Formats that dense weights are converted to while they are loaded, by role: "attention" (all
  /// of self_attn but o_proj), "o_proj", "shared_experts", "mlp" (of the dense layers), "lm_head"
  /// (unless it is the embedding, too); to "fp8" (128 x 128 tiles), all but attention and lm_head
  /// also to "nvfp4"; "keep": as published, like the roles that are not named. A matrix is
  /// converted only if that makes it smaller. Not given: all as published; where VRAM does not hold
  /// that, FP8 first, then NVFP4, as few roles as it takes, but not lm_head. Weights that stay on
  /// the SSD are as published.
  std::optional<std::map<std::string, std::string>> quantization;
  /// Which experts stay in RAM: "default", "lru", "lfu", "lrfu" or "router".
  std::string cache_policy = "default";
  /// A folder for small files. One remembers how experts were used, so that the next load caches
  /// them at once. One keeps the machine's Rates: the first load of a model whose experts lie on
  /// the SSD takes some seconds to measure them; so does each one with ssd_rate, if none are kept.
  /// Empty: nothing is remembered or measured.
  std::string warm_start_folder;
  /// A file for a timeline that Perfetto (ui.perfetto.dev) opens: steps, waits, and what SSD, PCIe,
  /// CPU and GPU do, on one clock. Replaced; written while the Model lives. Empty: none.
  std::string trace_file;
  /// "auto", "io_uring" or "pread", and whether reads pass by the page cache.
  std::string reader = "auto";
  bool direct_reads = true;
  /// Bytes per second that reads are held to, for measuring as if the disk were that slow, 10^6 to
  /// 10^12; 0: as fast as it is.
  std::uint64_t ssd_rate = 0;
  /// Most RAM of the process in bytes: weights, KV cache, buffers and what the process has already
  /// or has promised to its other models. 0: what the machine, or the control group, can spare. A
  /// limit below what is needed is refused with MemoryLimitError, which gives the number; so is one
  /// that makes the machine swap. Experts that do not fit stay on the SSD, and so do the dense
  /// weights of as many layers as must.
  std::uint64_t ram_limit = 0;
  /// Called while weights are read, in bytes. An exception thrown by it ends the load.
  std::function<void(std::uint64_t done, std::uint64_t total)> progress;
  KeepGoing keep_going;
};

struct GenerateOptions {
  /// Bytes of this struct in the program, for the library (api.h). Leave it as it is.
  std::size_t struct_bytes = sizeof(GenerateOptions);
  /// Most tokens to generate, at least 1.
  std::int64_t max_tokens = 256;
  /// 0 is greedy; else logits are divided by it. 0 to 100.
  double temperature = 0.0;
  /// Sample from the top_k likeliest tokens only; 0 is off.
  std::int64_t top_k = 0;
  /// Sample from the likeliest tokens whose probabilities add up to top_p only; over 0, to 1 (off).
  double top_p = 1.0;
  /// Leave out tokens whose probability is below min_p times that of the likeliest; 0 (off) to 1.
  double min_p = 0.0;
  /// Positive logits of tokens that are in the prompt or the answer already are divided by this,
  /// negative ones multiplied (Keskar et al. 2019); over 0, to 100; 1 is off.
  double repetition_penalty = 1.0;
  /// Added to the logits of single tokens, after the penalty; -infinity forbids a token.
  std::vector<std::pair<std::int32_t, float>> logit_bias;
  /// For each token, also report its log probability and those of the likeliest `logprobs` tokens;
  /// 0 (off) to 20.
  int logprobs = 0;
  /// The same seed, prompt and options give the same tokens; beside a GPU with cpu_share 0 only.
  std::uint64_t seed = 0;
  /// Tokens that end the answer (and are not part of it); none given: the model's end tokens.
  std::optional<std::vector<std::int32_t>> stop_ids;
  /// Called as the prompt is worked off, in tokens, and whenever keep_going is asked until it is;
  /// false cancels.
  std::function<bool(std::int64_t done, std::int64_t total)> on_prefill;
  KeepGoing keep_going;
};

struct TokenLogprob {
  std::int32_t id = 0;
  /// Natural logarithm of the probability that the model itself gives (temperature 1, no penalty).
  float logprob = 0.0f;
};

struct TokenLogprobs {
  TokenLogprob chosen;
  std::vector<TokenLogprob> top;  // the likeliest, best first
};

enum class FinishReason : std::uint8_t {
  kStop,       // a stop token came
  kLength,     // max_tokens or the context limit is reached
  kCancelled,  // a callback or keep_going said so
};

struct GenerationResult {
  /// Bytes of this struct in the program, for the library (api.h). Leave it as it is.
  std::size_t struct_bytes = sizeof(GenerationResult);
  std::vector<std::int32_t> tokens;
  std::vector<TokenLogprobs> logprobs;  // one a token, if they were asked for
  FinishReason finish_reason = FinishReason::kLength;
  std::int64_t prompt_tokens = 0;
  double prefill_seconds = 0.0;
  double decode_seconds = 0.0;
};

/// Called with each token as it is chosen, on the calling thread; false cancels the generation.
using TokenCallback = std::function<bool(std::int32_t token)>;

struct ForwardOptions {
  /// Bytes of this struct in the program, for the library (api.h). Leave it as it is.
  std::size_t struct_bytes = sizeof(ForwardOptions);
  /// Experts to use instead of the router's choice, [moe_layers, tokens, num_experts_per_tok];
  /// empty: the router's. Mixing weights come from the router's scores either way.
  std::span<const std::int32_t> forced_experts;
  /// Receives the router's own choice, same shape, best first; empty: not wanted.
  std::span<std::int32_t> chosen_experts;
  /// Receives the routers' logits, [moe_layers, tokens, num_experts()]; empty: not wanted.
  std::span<float> router_logits;
  /// Run the tokens one by one through the decode path.
  bool decode = false;
  /// False leaves the routed experts out, to measure the time of all else. Only of a model whose
  /// experts are not all in memory (ModelStats::tiered).
  bool routed_experts = true;
  KeepGoing keep_going;
  /// Receives the logits of all tokens in order, some rows at a time, in place of forward()'s span:
  /// [rows, vocab_size()] for the tokens from `first` on, valid during the call. That takes memory
  /// for kLogitRows rows, however many tokens there are. An exception thrown by it ends forward().
  std::function<void(std::int64_t first, std::span<const float> rows)> on_logits;
};

/// Most rows that ForwardOptions::on_logits is given at a time.
inline constexpr std::int64_t kLogitRows = 32;

/// A loaded checkpoint. Moves, but is not copied.
class DSFP4_API Model {
 public:
  /// Loads the checkpoint in `folder`: config.json and *.safetensors as published; symbolic links
  /// are followed. The files must not change while the Model lives. Throws
  /// CheckpointError, UnsupportedError, IoError, MemoryLimitError, ParameterError.
  static Model load(const std::filesystem::path& folder, const LoadOptions& options = {});

  Model(Model&&) noexcept;
  Model& operator=(Model&&) noexcept;
  ~Model();

  /// Token ids are 0 to this, exclusive.
  std::int64_t vocab_size() const noexcept;
  /// Layers with experts, and experts that each token takes in one: the shape of ForwardOptions'
  /// choices.
  std::int64_t moe_layers() const noexcept;
  std::int64_t num_experts_per_tok() const noexcept;
  /// Routed experts in a MoE layer.
  std::int64_t num_experts() const noexcept;
  /// Tokens.
  std::int64_t max_context() const noexcept;
  /// Bytes of weights in memory, in their stored formats.
  std::uint64_t weight_bytes() const noexcept;
  /// What LoadOptions::device came to. The string lives as long as the Model.
  const std::string& device() const noexcept;

  /// Logits of every token of `ids` given those before it, row-major into `logits`
  /// [ids.size(), vocab_size()]; empty where they are not wanted, and with options.on_logits, which
  /// gets them instead. Throws
  /// ParameterError for an id outside the vocabulary or a span of the wrong size,
  /// ContextLengthError for too many ids.
  void forward(std::span<const std::int32_t> ids, std::span<float> logits,
               const ForwardOptions& options = {});

  /// Take effect with the next call; what can stay in memory stays. Throw ParameterError and
  /// MemoryLimitError, and then nothing has changed.
  void set_memory_config(const MemoryConfig& config, const KeepGoing& keep_going = {});
  void set_memory_strategy(const MemoryStrategy& strategy, const KeepGoing& keep_going = {});
  void set_compute_streams(const ComputeStreams& streams, const KeepGoing& keep_going = {});
  /// Returns at once, while another call runs, too: then its numbers are of that moment.
  DSFP4_LOCAL ModelStats stats() const {
    ModelStats stats;
    read_stats(stats);
    return stats;
  }

  /// Continues `prompt` (at least one id; nothing is added to it) until a token in stop_ids,
  /// max_tokens, the end of the context or a callback that returns false. Throws ParameterError,
  /// and ContextLengthError where the prompt leaves no room for one token.
  DSFP4_LOCAL GenerationResult generate(std::span<const std::int32_t> prompt,
                                        const GenerateOptions& options = {},
                                        const TokenCallback& on_token = {}) {
    GenerationResult result;
    generate_into(result, prompt, options, on_token);
    return result;
  }

 private:
  // The program makes the structs that come back, as it knows how large they are there.
  void read_stats(ModelStats& stats) const;
  void generate_into(GenerationResult& result, std::span<const std::int32_t> prompt,
                     const GenerateOptions& options, const TokenCallback& on_token);
  struct Impl;
  struct Destroy {
    void operator()(Impl* impl) const noexcept;
  };
  explicit Model(std::unique_ptr<Impl, Destroy> impl);
  std::unique_ptr<Impl, Destroy> impl_;
};

}  // namespace DSFP4_ABI_NAMESPACE
}  // namespace dsfp4
