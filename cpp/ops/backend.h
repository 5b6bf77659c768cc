// The operations that the model is written in. Every backend computes the same functions;
// `reference` defines them, the others agree with it to a stated tolerance.
//
// Conventions: matrices are row-major FP32 in the backend's memory; a row is a token unless said
// otherwise. Weights stay in their stored format. Backends other than `reference` may round the
// inputs of a matrix product to BF16 and accumulate in FP32. In host memory the order of every sum
// depends on nothing but the shape of a single row, so a token's result does not depend on its
// company; on a GPU the number of tokens chooses the kernel, and company may change the last bits.
// Ops of one backend object are called from one thread at a time.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string_view>

#include "format/weight.h"
#include "memory/source.h"

namespace dsfp4::ops {

struct ConstMatrix {
  const float* data = nullptr;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t stride = 0;  // floats from one row to the next

  const float* row(std::int64_t r) const { return data + r * stride; }
};

struct Matrix {
  float* data = nullptr;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t stride = 0;

  float* row(std::int64_t r) const { return data + r * stride; }
  Matrix slice(std::int64_t first, std::int64_t count) const {
    return {row(first), count, cols, stride};
  }
  /// Columns [first, first + count) of every row.
  Matrix columns(std::int64_t first, std::int64_t count) const {
    return {data + first, rows, count, stride};
  }
  operator ConstMatrix() const { return {data, rows, cols, stride}; }  // NOLINT: a plain view
};

/// Prefill attends to keys and values expanded from the latents; decode works on the latents
/// themselves. The phase, never a size, chooses the path.
enum class Phase : std::uint8_t { kPrefill, kDecode };

/// What a matrix product does to its activations.
enum class Inputs : std::uint8_t {
  kBf16,  // may be rounded to BF16, or to a block-scaled integer that loses less
  kF32,   // as they are: the router
};

/// Geometry of multi-head latent attention.
struct MlaShape {
  std::int64_t heads = 0;
  std::int64_t kv_lora_rank = 0;
  std::int64_t qk_nope_head_dim = 0;
  std::int64_t qk_rope_head_dim = 0;
  std::int64_t v_head_dim = 0;
  float softmax_scale = 0.0f;

  constexpr std::int64_t qk_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
  /// Values that the cache holds for a token and layer: the latent, then the rotated shared key.
  constexpr std::int64_t cache_width() const { return kv_lora_rank + qk_rope_head_dim; }
};

enum class KvFormat : std::uint8_t { kF32, kBf16, kFp8 };  // kFp8: E4M3 times KvView::scale

/// Bytes of one cached value.
std::size_t kv_value_bytes(KvFormat format);

/// Tokens in one block of the KV cache.
inline constexpr std::int64_t kKvBlockTokens = 64;

/// One sequence's cache in one layer: token t lies in blocks[t / kKvBlockTokens], `layer_offset`
/// bytes in, as row t % kKvBlockTokens of [kKvBlockTokens, cache_width].
struct KvView {
  std::span<std::byte* const> blocks;
  std::size_t layer_offset = 0;
  KvFormat format = KvFormat::kF32;
  float scale = 1.0f;  // kFp8 only: the layer's k_scale
};

/// The rows of a batch that belong to one sequence: tokens at `position`, `position` + 1, ...
struct SequenceRows {
  std::int64_t first_row = 0;
  std::int64_t rows = 0;
  std::int64_t position = 0;
  KvView kv;

  /// Tokens that the last row of this step may look at.
  std::int64_t length() const { return position + rows; }
};

/// How a family chooses experts.
struct RouterSpec {
  enum class Scoring : std::uint8_t { kSoftmax, kSigmoid };
  enum class GroupScore : std::uint8_t { kMax, kSumOfTop2 };

  std::int64_t experts = 0;
  std::int64_t top_k = 0;
  std::int64_t groups = 1;
  std::int64_t kept_groups = 1;  // == groups: no group limit
  Scoring scoring = Scoring::kSoftmax;
  GroupScore group_score = GroupScore::kMax;
  bool normalize = false;  // weights divided by their sum + 1e-20
  float scaling_factor = 1.0f;
};

/// Chosen experts, [tokens, top_k] row-major, in the backend's memory.
struct Routing {
  std::span<std::int32_t> experts;  // the router's own choice, best first, lower index on a tie
  std::span<std::int32_t> used;     // what `weights` belong to: the own choice or the forced one
  std::span<float> weights;
  /// What the choice was made from, [tokens, experts]; empty where nobody asks for it.
  ConstMatrix logits = {};
};

struct ExpertView {
  format::WeightView gate_proj, up_proj, down_proj;
};

/// One expert and the (token, slot) pairs that chose it, each as token * top_k + slot.
struct ExpertTask {
  const ExpertView* expert = nullptr;
  std::span<const std::int32_t> pairs;
};

/// How one token is drawn from logits; see GenerateOptions.
struct SampleSpec {
  double temperature = 0.0;  // 0: the likeliest
  std::int64_t top_k = 0;    // 0 is off
  double top_p = 1.0;
  double min_p = 0.0;
  double uniform = 0.0;  // the draw, in [0, 1)
};

/// Columns of the widest weight in each WeightFormat; 0 if there is none.
struct WidestWeights {
  std::array<std::int64_t, format::kWeightFormats> all{};  // but the down-projections of experts
  std::array<std::int64_t, format::kWeightFormats> expert_down{};
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string_view name() const = 0;
  /// The instruction set that it computes with; empty where there is no choice.
  virtual std::string_view isa() const { return {}; }
  /// The format that loses nothing against the backend's own arithmetic.
  virtual KvFormat default_kv_format() const = 0;

  /// Where this backend's matrices, weights and caches live: arenas for them take their block here.
  virtual memory::MemorySource& memory() { return memory::host_memory(); }
  /// Whether the host may touch that memory directly; else only upload() and download() do.
  virtual bool host_visible() const { return true; }
  /// Copies from the host into the backend's memory, before the ops that follow; `from` may change
  /// once this returns.
  virtual void upload(const void* from, void* to, std::size_t bytes) {
    std::memcpy(to, from, bytes);
  }
  /// Copies to the host, after the ops that went before; done when this returns.
  virtual void download(const void* from, void* to, std::size_t bytes) {
    std::memcpy(to, from, bytes);
  }

  /// The ops that follow belong to a step of this phase: a backend may have a code path for each.
  virtual void begin_step(Phase phase) { static_cast<void>(phase); }

  /// kNone: the ops run as they come, and end_recorded() is not called. kBegun: those up to
  /// end_recorded() are one whole, and nothing waits or leaves between them. kReplayed: an earlier
  /// recording has been queued, and the caller leaves the ops out.
  enum class StepRecording : std::uint8_t { kNone, kBegun, kReplayed };
  /// A step whose ops depend on the host through `ids` and `batch` alone may be recorded: between
  /// this and end_recorded() come the same ops, on the same memory, for every step of the same
  /// `rows`.
  virtual StepRecording begin_recorded(std::span<const std::int32_t> ids,
                                       std::span<const SequenceRows> batch) {
    static_cast<void>(ids), static_cast<void>(batch);
    return StepRecording::kNone;
  }
  /// The ops since begin_recorded() run, if they have not yet.
  virtual void end_recorded() {}
  /// Gives up a recording that an error has broken off; nothing if none is going on.
  virtual void drop_recorded() noexcept {}

  /// out[t] = row ids[t] of `table` (F32 or BF16).
  virtual void embed(const format::WeightView& table, std::span<const std::int32_t> ids,
                     Matrix out) = 0;
  /// y = x / sqrt(mean(x^2) + eps) * weight, row by row. y may be x.
  virtual void rms_norm(ConstMatrix x, std::span<const float> weight, float eps, Matrix y) = 0;
  /// y = x W^T: x [tokens, W.cols], y [tokens, W.rows]. y must not overlap x.
  virtual void linear(const format::WeightView& weight, ConstMatrix x, Matrix y,
                      Inputs inputs = Inputs::kBf16) = 0;
  /// linear() of two weights with the same number of columns, and the same x.
  virtual void linear_pair(const format::WeightView& first, Matrix y_first,
                           const format::WeightView& second, Matrix y_second, ConstMatrix x) {
    linear(first, x, y_first);
    linear(second, x, y_second);
  }
  /// gate = silu(gate) * up.
  virtual void silu_mul(Matrix gate, ConstMatrix up) = 0;
  virtual void zero(Matrix y) = 0;
  /// y += x.
  virtual void add(ConstMatrix x, Matrix y) = 0;
  /// Rotates adjacent pairs: (a, b) -> (a cos - b sin, b cos + a sin). x holds cos_sin.cols / 2
  /// pairs at each of `heads` places a row, `head_stride` floats apart; row t of cos_sin is
  /// [cos_0, sin_0, cos_1, sin_1, ...].
  virtual void rope(Matrix x, std::int64_t heads, std::int64_t head_stride,
                    ConstMatrix cos_sin) = 0;

  /// Stores each row [latent | rotated key] (x.cols = cache_width) at its token's place.
  virtual void kv_append(std::span<const SequenceRows> batch, ConstMatrix x) = 0;
  /// What lies between projections and attention: rope() of each head's last values in q, and of
  /// the key in kv [latent | key]; rms_norm() of the latent; kv_append() of that. kv's values are
  /// undefined afterwards.
  virtual void mla_inputs(const MlaShape& shape, std::span<const SequenceRows> batch,
                          ConstMatrix cos_sin, std::span<const float> kv_norm, float eps, Matrix q,
                          Matrix kv) {
    rope(q.columns(shape.qk_nope_head_dim, q.cols - shape.qk_nope_head_dim), shape.heads,
         shape.qk_head_dim(), cos_sin);
    const Matrix latent = kv.columns(0, shape.kv_lora_rank);
    rms_norm(latent, kv_norm, eps, latent);
    rope(kv.columns(shape.kv_lora_rank, shape.qk_rope_head_dim), 1, 0, cos_sin);
    kv_append(batch, kv);
  }
  /// Prefill. Each head's keys and values are expanded from the cached latents by kv_b_proj
  /// [heads * (nope + v), kv_lora_rank], then causal attention.
  /// q: [tokens, heads * (nope + rope)]; out: [tokens, heads * v].
  virtual void prefill_attention(const MlaShape& shape, const format::WeightView& kv_b_proj,
                                 std::span<const SequenceRows> batch, ConstMatrix q,
                                 Matrix out) = 0;
  /// Decode, first part: q_abs[h] = q_nope[h] W_UK[h]; q_abs: [tokens, heads * kv_lora_rank].
  virtual void absorb_query(const MlaShape& shape, const format::WeightView& kv_b_proj,
                            ConstMatrix q, Matrix q_abs) = 0;
  /// Second: p = softmax((q_abs . latent + q_pe . k_pe) * scale), out[h] = sum p * latent;
  /// out: [tokens, heads * kv_lora_rank].
  virtual void latent_attention(const MlaShape& shape, std::span<const SequenceRows> batch,
                                ConstMatrix q_abs, ConstMatrix q, Matrix out) = 0;
  /// Third: out[h] = attended[h] W_UV[h]^T; out: [tokens, heads * v].
  virtual void expand_value(const MlaShape& shape, const format::WeightView& kv_b_proj,
                            ConstMatrix attended, Matrix out) = 0;

  /// Scores, choice and mixing weights from router logits [tokens, experts]. `bias` (empty if the
  /// family has none) is added for the choice only. `forced` (empty: the own choice) is
  /// [tokens, top_k]; its weights still come from the scores.
  virtual void route(const RouterSpec& spec, ConstMatrix logits, std::span<const float> bias,
                     std::span<const std::int32_t> forced, Routing out) = 0;
  /// For every pair p of every task: out[p] = down(silu(gate x) * up x), x = row p / top_k.
  /// `hidden` is scratch [pairs, moe_intermediate_size]; out is [tokens * top_k, hidden_size].
  virtual void experts(std::span<const ExpertTask> tasks, std::int64_t top_k, ConstMatrix x,
                       Matrix hidden, Matrix out) = 0;
  /// y[t] += sum over slots k, ascending, of weights[t, k] * pairs[t * top_k + k].
  virtual void combine(ConstMatrix pairs, std::span<const float> weights, std::int64_t top_k,
                       Matrix y) = 0;

  /// y[t] += sum over slots k, ascending, of routing.weights[t, k] * experts[routing.used[t, k]](x)
  /// with the routing where the backend keeps it; `hidden` and `routed` are scratch [pairs,
  /// moe_intermediate_size] and [pairs, hidden_size]. False, and nothing done: this backend has no
  /// such op, and the caller groups the pairs for experts() and combine() itself.
  /// `shared`, if not null, is one more expert of every token: y[t] = shared(x) + that sum. Only
  /// where takes_shared() says so; `hidden` then has a row more for each token.
  virtual bool routed_experts(std::span<const ExpertView> experts, const Routing& routing,
                              std::int64_t top_k, ConstMatrix x, Matrix hidden, Matrix routed,
                              Matrix y, const ExpertView* shared) {
    static_cast<void>(experts), static_cast<void>(routing), static_cast<void>(top_k);
    static_cast<void>(x), static_cast<void>(hidden), static_cast<void>(routed);
    static_cast<void>(y), static_cast<void>(shared);
    return false;
  }
  /// Whether routed_experts() computes `shared`, too, for so many tokens.
  virtual bool takes_shared(std::span<const ExpertView> experts, const ExpertView& shared,
                            std::int64_t tokens, std::int64_t top_k) const {
    static_cast<void>(experts), static_cast<void>(shared);
    static_cast<void>(tokens), static_cast<void>(top_k);
    return false;
  }
  /// The token that `spec` chooses from logits [1, vocab] in the backend's memory, the lower id in
  /// a tie; -1 if every logit is NaN or -infinity. None: the backend leaves that to the host.
  virtual std::optional<std::int32_t> sample(ConstMatrix logits, const SampleSpec& spec) {
    static_cast<void>(logits), static_cast<void>(spec);
    return std::nullopt;
  }

  /// What the largest steps will be, so that all memory they need is taken now.
  struct Largest {
    MlaShape mla;
    std::int64_t rows = 0;     // of a step
    std::int64_t context = 0;  // tokens of a sequence
    std::int64_t width = 0;    // columns of the widest weight
    std::int64_t vocab = 0;
    std::int64_t top_k = 0;
    std::span<const ExpertView> experts = {};  // of any layer, perhaps without data; may be empty
    std::int64_t moe_layers = 0;
    std::int64_t hidden_size = 0;
    std::int64_t moe_intermediate_size = 0;  // 0: no experts
    WidestWeights widest;
  };
  /// Bytes of memory() that ops take beside their operands, in steps no larger than `largest`;
  /// reserve() and prepare_experts() take them.
  virtual std::uint64_t working_bytes(const Largest& largest) const {
    static_cast<void>(largest);
    return 0;
  }
  virtual void reserve(const Largest& largest) { static_cast<void>(largest); }
  /// Tells of experts, or of a change of them, before routed_experts() is called with them.
  virtual void prepare_experts(std::span<const ExpertView> experts) { static_cast<void>(experts); }
};

/// The scalar truth. `threads` > 1 splits independent outputs; no sum is split.
std::unique_ptr<Backend> make_reference_backend(int threads);
/// SIMD on `threads` cores; the instruction set is chosen by CPUID.
std::unique_ptr<Backend> make_cpu_backend(int threads);
/// An NVIDIA GPU, counted from 0. `memory_limit` is in bytes and holds for everything that the
/// process takes on the GPU, the context included; 0 is what is free. Throws CudaError where there
/// is no usable GPU, driver or plugin.
std::unique_ptr<Backend> make_cuda_backend(int index, std::uint64_t memory_limit);

}  // namespace dsfp4::ops
