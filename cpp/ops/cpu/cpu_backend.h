// The CPU backend: weights decoded next to the multiply, activations rounded to BF16, FP32 sums.
#pragma once

#include <array>
#include <functional>
#include <utility>
#include <vector>

#include "ops/cpu/isa.h"
#include "ops/cpu/layer_kernels.h"
#include "ops/cpu/scratch.h"
#include "ops/host_ops.h"

namespace dsfp4::ops::cpu {

// In here they have plain pointers; the ops of CpuBackend unwrap those they are given.
using raw::ConstMatrix;
using raw::Matrix;

class CpuBackend final : public HostBackend {
 public:
  CpuBackend(int threads, const Isa& isa)
      : HostBackend(threads), isa_(isa), kernels_(*isa.kernels), thread_memory_(threads) {}

  std::string_view name() const override { return "cpu"; }
  std::string_view isa() const override { return isa_.name; }
  KvFormat default_kv_format() const override { return KvFormat::kBf16; }

  std::uint64_t working_bytes(const Largest& largest) const override;
  void reserve(const Largest& largest) override;

  void rms_norm(ops::ConstMatrix x, DeviceSpan<const float> weight, float eps,
                ops::Matrix y) override;
  void linear(const WeightView& weight, ops::ConstMatrix x, ops::Matrix y, Phase phase,
              Inputs inputs) override;
  void silu_mul(ops::Matrix gate, ops::ConstMatrix up) override;
  void add(ops::ConstMatrix x, ops::Matrix y) override;
  void combine(ops::ConstMatrix pairs, DeviceSpan<const float> weights, std::int64_t top_k,
               ops::Matrix y) override;

  void prefill_attention(const MlaShape& shape, const WeightView& kv_b_proj,
                         std::span<const SequenceRows> batch, ops::ConstMatrix q,
                         ops::Matrix out) override;
  void absorb_query(const MlaShape& shape, const WeightView& kv_b_proj, ops::ConstMatrix q,
                    ops::Matrix q_abs) override;
  void latent_attention(const MlaShape& shape, std::span<const SequenceRows> batch,
                        ops::ConstMatrix q_abs, ops::ConstMatrix q, ops::Matrix out) override;
  void expand_value(const MlaShape& shape, const WeightView& kv_b_proj, ops::ConstMatrix attended,
                    ops::Matrix out) override;

  void experts(std::span<const ExpertTask> tasks, std::int64_t top_k, ops::ConstMatrix x,
               ops::Matrix hidden, ops::Matrix out, Phase phase) override;

 protected:
  void add_fitting_experts(std::span<const ExpertTask> tasks, DeviceSpan<const float> weights,
                           std::int64_t top_k, ops::ConstMatrix x, ops::Matrix hidden,
                           ops::Matrix out, ops::Matrix y, Phase phase) override;

 private:
  /// Rows of activations, packed for a Matmul.
  struct Packed {
    std::byte* data = nullptr;
    std::size_t stride = 0;  // bytes

    std::byte* row(std::int64_t r) const { return data + static_cast<std::size_t>(r) * stride; }
  };
  /// What computes the rows [begin, end) of `weight` for tokens [first, first + count) of a task;
  /// `next` as in Product.
  using Multiply = std::function<void(
      const format::WeightView& weight, const format::WeightView* next, std::int64_t begin,
      std::int64_t end, std::int64_t first, std::int64_t count, float* y, std::byte* scratch)>;

  const Matmul& matmul_of(format::WeightFormat format, Phase phase) const {
    return isa_.matmul(format, Inputs::kBf16, phase);
  }
  Packed pack(const Matmul& matmul, ConstMatrix x, Inputs inputs);
  /// The tokens of all pairs, to tokens_ and first_token_.
  void list_tokens(std::span<const ExpertTask> tasks, std::int64_t top_k);
  /// Packed rows for the first projections of all tasks, room for those of the second ones.
  void prepare(std::span<const ExpertTask> tasks, ConstMatrix x, Matrix hidden, Phase phase);
  /// out[p] of every pair p of the tasks, whose tokens are listed.
  void compute_experts(std::span<const ExpertTask> tasks, ConstMatrix x, Matrix hidden, Matrix out,
                       Phase phase);
  /// Packs the rows of `hidden` that these tasks name, the first of them task `first_task` of the
  /// op, into hidden_.
  void pack_hidden(std::span<const ExpertTask> tasks, std::size_t first_task, ConstMatrix hidden,
                   Phase phase);
  /// silu(gate x) * up x in rows [begin, end), for `block` tokens at a time; works in a thread's
  /// block of gate_and_up_bytes(end - begin, block).
  void gate_and_up(const ExpertTask& task, std::int64_t begin, std::int64_t end, std::int64_t block,
                   const Multiply& multiply, Matrix hidden, std::byte* scratch) const;
  std::size_t gate_and_up_bytes(std::int64_t rows, std::int64_t block) const;
  bool tiles_fit(std::span<const ExpertTask> tasks) const;
  void linear_in_tiles(const format::WeightView& weight, const Packed& x, std::int64_t tokens,
                       Matrix y);
  void experts_in_tiles(std::span<const ExpertTask> tasks, Matrix hidden, Matrix out);
  /// Some tasks, the first of them task `first_task` of the op; their groups are first_group_.
  void group_tasks(std::span<const ExpertTask> tasks, std::size_t first_task, Matrix hidden,
                   Matrix out);
  /// The packed rows of a task, and which of them are its tokens.
  using Source = std::function<std::pair<Packed, const std::int32_t*>(std::size_t task)>;
  void make_groups(std::span<const ExpertTask> tasks, std::int64_t cols, std::size_t bytes,
                   std::byte* memory, const Source& source_of);

  /// Memory of all kinds for steps no larger than `largest`.
  struct StepMemory;
  StepMemory step_memory(const Largest& largest) const;

  const Isa& isa_;
  const Kernels& kernels_;
  const LayerKernels& layer_ = layer_kernels_for(kernels_.isa);
  std::array<Scratch, kPackings> x_memory_;
  std::array<Packed, kPackings> x_;  // activations of the op that is running, by Matmul::packing
  Scratch hidden_memory_;
  Packed hidden_;                         // packed inputs of the down-projections, by pair
  std::vector<std::int32_t> tokens_;      // of the pairs of all tasks
  std::vector<std::size_t> first_token_;  // of each task, in tokens_
  std::vector<std::int32_t> places_;      // rows of scratch of the pairs that are added: 0, 1, ...
  std::vector<ExpertTask> placed_;        // tasks whose pairs are those
  Scratch groups_memory_;
  std::vector<std::int64_t> first_group_;  // of each task in work, and one past the last
  Scratch partials_;                       // of latent attention
  ThreadScratch thread_memory_;
  std::size_t multiply_bytes_ = most_scratch(isa_);  // what any multiply() needs of a block

  static std::size_t most_scratch(const Isa& isa);
};

/// Tokens whose gate and up rows wait in a thread's block: without tiles, and with them.
inline constexpr std::int64_t kExpertTokens = 96;
inline constexpr std::int64_t kTileExpertTokens = 512;
/// Groups of 16 tokens, of `bytes` each, whose experts are computed at once; the last task may go
/// beyond.
std::int64_t groups_at_once(std::size_t bytes);
inline constexpr std::int64_t kMostPieceRows = 256;  // of rows_per_piece()
/// Rows for one piece of work on a matrix of `rows` x `row_bytes`, a multiple of `step`: enough
/// bytes that memory is read in long runs, enough pieces that no thread waits long for the last.
std::int64_t rows_per_piece(std::int64_t rows, std::size_t row_bytes, std::int64_t step,
                            std::int64_t matrices, int threads);

}  // namespace dsfp4::ops::cpu
