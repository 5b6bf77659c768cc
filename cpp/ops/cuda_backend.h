// The backend on an NVIDIA GPU: what the model calls, in terms of the plugin's table.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "ops/backend.h"
#include "ops/cuda/abi.h"

namespace dsfp4::ops {

/// Throws what the last failure of the plugin's table was, if `ok` is false.
void cuda_check(const cuda::Plugin& plugin, bool ok);

/// A device's memory that all models of the process have taken, in bytes.
struct CudaAccount {
  std::mutex mutex;
  std::uint64_t used = 0;
};

/// Device memory within a limit. The limit holds for what the whole process takes on the device:
/// the context, and everything that came through here, for this model or another one.
class CudaMemory final : public memory::MemorySource {
 public:
  /// `context_bytes` are gone already.
  CudaMemory(const cuda::Plugin& plugin, cuda::Device* device, CudaAccount& account,
             std::uint64_t limit, std::uint64_t context_bytes)
      : plugin_(plugin),
        device_(device),
        account_(account),
        limit_(limit),
        context_bytes_(context_bytes) {}

  std::byte* allocate(std::size_t bytes) noexcept override;
  void release(std::byte* memory, std::size_t bytes) noexcept override;
  bool host_accessible() const noexcept override { return false; }
  const char* name() const noexcept override { return "VRAM"; }
  std::size_t available() const noexcept override;

  /// As allocate(), but throws MemoryLimitError with `purpose`.
  std::byte* take(std::size_t bytes, const char* purpose);

 private:
  std::size_t available_locked() const noexcept;

  const cuda::Plugin& plugin_;
  cuda::Device* device_;
  CudaAccount& account_;
  std::uint64_t limit_;
  std::uint64_t context_bytes_;
};

/// An open device of the plugin.
class OpenDevice {
 public:
  /// Throws CudaError.
  OpenDevice(const cuda::Plugin& plugin, int index, bool portable);
  ~OpenDevice() { plugin_.close(device_); }
  OpenDevice(const OpenDevice&) = delete;
  OpenDevice& operator=(const OpenDevice&) = delete;
  // NOLINTNEXTLINE(google-explicit-constructor): it stands for the device in the plugin's calls
  operator cuda::Device*() const noexcept { return device_; }

 private:
  const cuda::Plugin& plugin_;
  cuda::Device* device_ = nullptr;
};

class CudaBackend final : public Backend {
 public:
  /// Throws CudaError, and MemoryLimitError where `memory_limit` (bytes, 0 for none) does not hold
  /// the context.
  CudaBackend(const cuda::Plugin& plugin, int index, std::uint64_t memory_limit);
  ~CudaBackend() override;
  CudaBackend(const CudaBackend&) = delete;
  CudaBackend& operator=(const CudaBackend&) = delete;

  std::string_view name() const override { return "cuda"; }
  KvFormat default_kv_format() const override { return KvFormat::kBf16; }
  memory::MemorySource& memory() override { return *device_memory_; }
  bool host_visible() const override { return false; }
  cuda::Device* device() const noexcept { return device_; }
  /// The stream of all work, a cudaStream_t.
  void* stream() const { return plugin_.stream(device_); }
  /// Waits until all work that was queued has run.
  void synchronize() { check(plugin_.synchronize(device_)); }
  void upload(const void* from, void* to, std::size_t bytes) override;
  void download(const void* from, void* to, std::size_t bytes) override;

  void begin_step(Phase phase) override { phase_ = phase; }
  StepRecording begin_recorded(std::span<const std::int32_t> ids,
                               std::span<const SequenceRows> batch) override;
  void end_recorded() override;
  void drop_recorded() noexcept override;

  void embed(const format::WeightView& table, std::span<const std::int32_t> ids,
             Matrix out) override;
  void rms_norm(ConstMatrix x, std::span<const float> weight, float eps, Matrix y) override;
  void linear(const format::WeightView& weight, ConstMatrix x, Matrix y, Inputs inputs) override;
  void linear_pair(const format::WeightView& first, Matrix y_first,
                   const format::WeightView& second, Matrix y_second, ConstMatrix x) override;
  void silu_mul(Matrix gate, ConstMatrix up) override;
  void zero(Matrix y) override;
  void add(ConstMatrix x, Matrix y) override;
  void rope(Matrix x, std::int64_t heads, std::int64_t head_stride, ConstMatrix cos_sin) override;

  void kv_append(std::span<const SequenceRows> batch, ConstMatrix x) override;
  void mla_inputs(const MlaShape& shape, std::span<const SequenceRows> batch, ConstMatrix cos_sin,
                  std::span<const float> kv_norm, float eps, Matrix q, Matrix kv) override;
  void prefill_attention(const MlaShape& shape, const format::WeightView& kv_b_proj,
                         std::span<const SequenceRows> batch, ConstMatrix q, Matrix out) override;
  void absorb_query(const MlaShape& shape, const format::WeightView& kv_b_proj, ConstMatrix q,
                    Matrix q_abs) override;
  void latent_attention(const MlaShape& shape, std::span<const SequenceRows> batch,
                        ConstMatrix q_abs, ConstMatrix q, Matrix out) override;
  void expand_value(const MlaShape& shape, const format::WeightView& kv_b_proj,
                    ConstMatrix attended, Matrix out) override;

  /// `forced` is on the host; `bias` and `out` are on the device.
  void route(const RouterSpec& spec, ConstMatrix logits, std::span<const float> bias,
             std::span<const std::int32_t> forced, Routing out) override;
  /// `tasks` and their pairs are on the host, weights on the device, where they may change between
  /// calls as abi.h says; rows of `out` that no task names stay. Takes no memory and waits for
  /// nothing once reserve() was told of experts and of steps that large. Throws CudaError, with
  /// nothing queued, where tasks do not fit `x`, `hidden` and `out`, and in a step that is
  /// recorded.
  void experts(std::span<const ExpertTask> tasks, std::int64_t top_k, ConstMatrix x, Matrix hidden,
               Matrix out) override;
  void combine(ConstMatrix pairs, std::span<const float> weights, std::int64_t top_k,
               Matrix y) override;
  bool routed_experts(std::span<const ExpertView> experts, const Routing& routing,
                      std::int64_t top_k, ConstMatrix x, Matrix hidden, Matrix routed, Matrix y,
                      const ExpertView* shared) override;
  bool takes_shared(std::span<const ExpertView> experts, const ExpertView& shared,
                    std::int64_t tokens, std::int64_t top_k) const override;
  void prepare_experts(std::span<const ExpertView> experts) override;
  std::uint64_t working_bytes(const Largest& largest) const override;
  void reserve(const Largest& largest) override;
  std::optional<std::int32_t> sample(ConstMatrix logits, const SampleSpec& spec) override;

 private:
  /// Device memory that grows on demand and is kept.
  class Buffer {
   public:
    explicit Buffer(const char* purpose) : purpose_(purpose) {}
    std::byte* reserve(CudaMemory& source, std::size_t bytes);
    std::byte* memory() const noexcept { return memory_; }
    void release(CudaMemory& source) noexcept;

   private:
    const char* purpose_;
    std::byte* memory_ = nullptr;
    std::size_t bytes_ = 0;
  };

  CudaBackend(const cuda::Plugin& plugin, int index, std::uint64_t memory_limit,
              std::uint64_t free_before);
  void check(bool ok) const { cuda_check(plugin_, ok); }
  std::byte* workspace(std::size_t bytes) { return workspace_.reserve(*device_memory_, bytes); }
  /// Of the largest step, in bytes.
  struct StepMemory {
    std::size_t workspace, ids, rows, blocks;
  };
  StepMemory step_memory(const Largest& largest) const;
  /// The rows of `batch` with their blocks on the device; copied there unless they are already.
  cuda::KvRows rows_of(std::span<const SequenceRows> batch);

  const cuda::Plugin& plugin_;
  OpenDevice device_;
  std::unique_ptr<CudaMemory> device_memory_;
  Buffer workspace_{"the CUDA workspace"};
  Buffer ids_{"the token ids"};
  Buffer forced_{"the forced experts"};
  Buffer rows_{"the rows of a step"};
  Buffer blocks_{"the table of cache blocks"};
  std::vector<cuda::RowPlace> host_rows_;   // what rows_ holds
  std::vector<std::byte*> host_blocks_;     // what blocks_ holds
  std::vector<std::int64_t> first_blocks_;  // one a sequence of the last batch

  // Recorded decode steps. A recording holds addresses: it is good as long as the buffers stay.
  struct Recording {
    int steps = 0;  // that ran like this before it was recorded, so that all is allocated
    void* graph = nullptr;
    std::array<std::byte*, 4> buffers{};
  };
  std::array<std::byte*, 4> buffers() const {
    return {workspace_.memory(), ids_.memory(), rows_.memory(), blocks_.memory()};
  }
  void forget(Recording& recording) noexcept;
  Phase phase_ = Phase::kPrefill;
  std::map<std::pair<std::int64_t, std::int64_t>, Recording> recordings_;  // rows, longest
  Recording* recording_ = nullptr;                                         // the step's own
  bool capturing_ = false;
  std::map<const ExpertView*, std::byte*> expert_tables_;
  std::map<const ExpertView*, std::size_t> expert_counts_;
};

}  // namespace dsfp4::ops
