// The operations that the model is written in. Every backend computes the same functions;
// `reference` defines them, the others agree with it to a stated tolerance.
//
// Backends other than `reference` may round the inputs of a matrix product to BF16 and accumulate
// in FP32. In host memory the order of every sum depends on nothing but the shape of a single row,
// so a token's result does not depend on its company; on a GPU the number of tokens chooses the
// kernel, and company may change the last bits.
//
// Ops run in order in the compute queue of their device, and may still be running when they return.
// What is said to be on the host may change once an op returns, all else lies on the device. Ops of
// one object are called from one thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string_view>

#include "ops/device.h"
#include "ops/views.h"

namespace dsfp4::ops {

/// A part of a step, and all that its ops take from the host.
struct Segment {
  std::int64_t part = 0;  // a number for the same ops on the same memory, in every step
  std::span<const std::int32_t> ids;
  std::span<const SequenceRows> batch;
};

/// The pairs that add_experts() has scratch for in a step of `rows` tokens: all of a short step,
/// else about one a row, but not more than it takes to compute at full speed.
std::int64_t added_pairs(std::int64_t rows, std::int64_t top_k);

class Ops {
 public:
  virtual ~Ops() = default;
  virtual std::string_view name() const = 0;
  /// The instruction set that it computes with; empty where there is no choice.
  virtual std::string_view isa() const { return {}; }
  /// The format that loses nothing against the backend's own arithmetic.
  virtual KvFormat default_kv_format() const = 0;

  /// The device it computes on, which may be used as long as this lives.
  virtual Device& device() const = 0;

  /// Runs `body`, or what was recorded for a segment of this part, so many rows and so long a
  /// context. So `body` must come to the same ops on the same memory each time, and take from the
  /// host only what the segment names; nothing in it waits, copies, or samples.
  virtual void segment(const Segment& segment, const std::function<void()>& body) {
    static_cast<void>(segment);
    body();
  }

  /// out[t] = row ids[t] of `table` (F32 or BF16).
  virtual void embed(const WeightView& table, std::span<const std::int32_t> ids, Matrix out) = 0;
  /// y = x / sqrt(mean(x^2) + eps) * weight, row by row. y may be x.
  virtual void rms_norm(ConstMatrix x, DeviceSpan<const float> weight, float eps, Matrix y) = 0;
  /// y = x W^T: x [tokens, W.cols], y [tokens, W.rows]. y must not overlap x.
  virtual void linear(const WeightView& weight, ConstMatrix x, Matrix y, Phase phase,
                      Inputs inputs = Inputs::kBf16) = 0;
  /// linear() of two weights with the same number of columns, and the same x.
  virtual void linear_pair(const WeightView& first, Matrix y_first, const WeightView& second,
                           Matrix y_second, ConstMatrix x, Phase phase) {
    linear(first, x, y_first, phase);
    linear(second, x, y_second, phase);
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
                          ConstMatrix cos_sin, DeviceSpan<const float> kv_norm, float eps, Matrix q,
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
  virtual void prefill_attention(const MlaShape& shape, const WeightView& kv_b_proj,
                                 std::span<const SequenceRows> batch, ConstMatrix q,
                                 Matrix out) = 0;
  /// Decode, first part: q_abs[h] = q_nope[h] W_UK[h]; q_abs: [tokens, heads * kv_lora_rank].
  virtual void absorb_query(const MlaShape& shape, const WeightView& kv_b_proj, ConstMatrix q,
                            Matrix q_abs) = 0;
  /// Second: p = softmax((q_abs . latent + q_pe . k_pe) * scale), out[h] = sum p * latent;
  /// out: [tokens, heads * kv_lora_rank].
  virtual void latent_attention(const MlaShape& shape, std::span<const SequenceRows> batch,
                                ConstMatrix q_abs, ConstMatrix q, Matrix out) = 0;
  /// Third: out[h] = attended[h] W_UV[h]^T; out: [tokens, heads * v].
  virtual void expand_value(const MlaShape& shape, const WeightView& kv_b_proj,
                            ConstMatrix attended, Matrix out) = 0;

  /// Scores, choice and mixing weights from router logits [tokens, experts]. `bias` (empty if the
  /// family has none) is added for the choice only. `forced` (empty: the own choice) is
  /// [tokens, top_k] on the host; its weights still come from the scores.
  virtual void route(const RouterSpec& spec, ConstMatrix logits, DeviceSpan<const float> bias,
                     std::span<const std::int32_t> forced, Routing out) = 0;
  /// For every pair p of every task: out[p] = down(silu(gate x) * up x), x = row p / top_k.
  /// `hidden` is scratch [pairs, moe_intermediate_size]; out is [tokens * top_k, hidden_size].
  virtual void experts(std::span<const ExpertTask> tasks, std::int64_t top_k, ConstMatrix x,
                       Matrix hidden, Matrix out, Phase phase) = 0;
  /// y[t] += sum over slots k, ascending, of weights[t, k] * pairs[t * top_k + k].
  virtual void combine(ConstMatrix pairs, DeviceSpan<const float> weights, std::int64_t top_k,
                       Matrix y) = 0;
  /// Task by task, in the order given: y[p / top_k] += weights[p] * down(silu(gate x) * up x), x =
  /// row p / top_k, for every pair p of the task, whose tokens differ. So a token's bits depend on
  /// the order of its own experts, not on where calls begin and end. `hidden` and `out` are scratch
  /// [added_pairs() of the step, moe_intermediate_size] and [as many, hidden_size]: so many pairs
  /// are computed at once.
  void add_experts(std::span<const ExpertTask> tasks, DeviceSpan<const float> weights,
                   std::int64_t top_k, ConstMatrix x, Matrix hidden, Matrix out, Matrix y,
                   Phase phase);

  /// True where there is routed_experts(); else the host, which must know the choice, makes tasks
  /// for experts() of it, and sums with combine().
  virtual bool has_routed_experts() const { return false; }
  /// y[t] += sum over slots k, ascending, of routing.weights[t, k] * experts[routing.used[t,
  /// k]](x); `hidden` and `routed` are scratch [pairs, moe_intermediate_size] and [pairs,
  /// hidden_size]. `shared`, if not null, is one more expert of every token: y[t] = shared(x) +
  /// that sum. Only where takes_shared() says so; `hidden` then has a row more for each token.
  virtual void routed_experts(std::span<const ExpertView> experts, const Routing& routing,
                              std::int64_t top_k, ConstMatrix x, Matrix hidden, Matrix routed,
                              Matrix y, const ExpertView* shared);
  /// True where routed_experts() computes `shared`, too, for so many tokens.
  virtual bool takes_shared(std::span<const ExpertView> experts, const ExpertView& shared,
                            std::int64_t tokens, std::int64_t top_k) const {
    static_cast<void>(experts), static_cast<void>(shared);
    static_cast<void>(tokens), static_cast<void>(top_k);
    return false;
  }
  /// The token that `spec` chooses from logits [1, vocab], the lower id in a tie; -1 if every logit
  /// is NaN or -infinity. None: the backend leaves that to the host.
  virtual std::optional<std::int32_t> sample(ConstMatrix logits, const SampleSpec& spec) {
    static_cast<void>(logits), static_cast<void>(spec);
    return std::nullopt;
  }

  /// The largest steps to come, so that all memory they need is taken now.
  struct Largest {
    MlaShape mla;
    std::int64_t rows = 0;        // of a step
    std::int64_t dense_rows = 0;  // of those that pass attention and dense MLPs together
    std::int64_t context = 0;     // tokens of a sequence
    std::int64_t width = 0;       // columns of the widest weight
    std::int64_t step_width = 0;  // of the widest that all rows of a step pass together
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

 protected:
  /// add_experts() of tasks, at least one, that have no more pairs together than `hidden` and `out`
  /// have rows.
  virtual void add_fitting_experts(std::span<const ExpertTask> tasks,
                                   DeviceSpan<const float> weights, std::int64_t top_k,
                                   ConstMatrix x, Matrix hidden, Matrix out, Matrix y,
                                   Phase phase) = 0;
};

/// The scalar truth, on the host's device. `threads` > 1 splits independent outputs; no sum is
/// split.
std::unique_ptr<Ops> make_reference_ops(int threads);
/// SIMD on `threads` cores, on the host's device; the instruction set is chosen by CPUID.
std::unique_ptr<Ops> make_cpu_ops(int threads);
/// An NVIDIA GPU, counted from 0. `memory_limit` is in bytes and holds for everything that the
/// process takes on the GPU, the context included; 0 is what is free. Throws CudaError where there
/// is no usable GPU, driver or plugin.
std::unique_ptr<Ops> make_cuda_ops(int index, std::uint64_t memory_limit);

}  // namespace dsfp4::ops
