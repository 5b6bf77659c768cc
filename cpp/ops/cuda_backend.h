// Ops on an NVIDIA GPU: what the model calls, in terms of the plugin's table.
#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "ops/cuda/abi.h"
#include "ops/cuda_device.h"
#include "ops/ops.h"

namespace dsfp4::ops {

class CudaBackend final : public Ops {
 public:
  /// So many segments are kept as recorded; of more, the one that ran longest ago goes.
  static constexpr std::size_t kMostRecordings = 128;

  /// Throws CudaError, and MemoryLimitError where `memory_limit` (bytes, 0 for none) does not hold
  /// the context.
  CudaBackend(const cuda::Plugin& plugin, int index, std::uint64_t memory_limit);
  ~CudaBackend() override;
  CudaBackend(const CudaBackend&) = delete;
  CudaBackend& operator=(const CudaBackend&) = delete;

  std::string_view name() const override { return "cuda"; }
  KvFormat default_kv_format() const override { return KvFormat::kBf16; }
  CudaDevice& device() const override { return *device_; }

  /// The first segment of its part, rows and length runs as it is, the second is recorded, and
  /// later ones are that recording, as long as the memory in it stays where it is. What cannot be
  /// recorded throws CudaError then, and the segment counts as one that never ran; so does one
  /// whose body throws.
  void segment(const Segment& segment, const std::function<void()>& body) override;

  void embed(const WeightView& table, std::span<const std::int32_t> ids, Matrix out) override;
  void rms_norm(ConstMatrix x, DeviceSpan<const float> weight, float eps, Matrix y) override;
  void linear(const WeightView& weight, ConstMatrix x, Matrix y, Phase phase,
              Inputs inputs) override;
  void linear_pair(const WeightView& first, Matrix y_first, const WeightView& second,
                   Matrix y_second, ConstMatrix x, Phase phase) override;
  void silu_mul(Matrix gate, ConstMatrix up) override;
  void zero(Matrix y) override;
  void add(ConstMatrix x, Matrix y) override;
  void rope(Matrix x, std::int64_t heads, std::int64_t head_stride, ConstMatrix cos_sin) override;

  void kv_append(std::span<const SequenceRows> batch, ConstMatrix x) override;
  void mla_inputs(const MlaShape& shape, std::span<const SequenceRows> batch, ConstMatrix cos_sin,
                  DeviceSpan<const float> kv_norm, float eps, Matrix q, Matrix kv) override;
  void prefill_attention(const MlaShape& shape, const WeightView& kv_b_proj,
                         std::span<const SequenceRows> batch, ConstMatrix q, Matrix out) override;
  void absorb_query(const MlaShape& shape, const WeightView& kv_b_proj, ConstMatrix q,
                    Matrix q_abs) override;
  void latent_attention(const MlaShape& shape, std::span<const SequenceRows> batch,
                        ConstMatrix q_abs, ConstMatrix q, Matrix out) override;
  void expand_value(const MlaShape& shape, const WeightView& kv_b_proj, ConstMatrix attended,
                    Matrix out) override;

  /// Throws CudaError where forced experts would be recorded.
  void route(const RouterSpec& spec, ConstMatrix logits, DeviceSpan<const float> bias,
             std::span<const std::int32_t> forced, Routing out) override;
  /// Weights may change between calls as abi.h says; rows of `out` that no task names stay. Takes
  /// no memory of the device and waits for nothing once reserve() was told of experts and of steps
  /// that large. Throws CudaError, with nothing queued, where tasks do not fit `x`, `hidden` and
  /// `out`, and in a segment that is recorded.
  void experts(std::span<const ExpertTask> tasks, std::int64_t top_k, ConstMatrix x, Matrix hidden,
               Matrix out, Phase phase) override;
  void combine(ConstMatrix pairs, DeviceSpan<const float> weights, std::int64_t top_k,
               Matrix y) override;
  bool has_routed_experts() const override { return true; }
  void routed_experts(std::span<const ExpertView> experts, const Routing& routing,
                      std::int64_t top_k, ConstMatrix x, Matrix hidden, Matrix routed, Matrix y,
                      const ExpertView* shared) override;
  bool takes_shared(std::span<const ExpertView> experts, const ExpertView& shared,
                    std::int64_t tokens, std::int64_t top_k) const override;
  void prepare_experts(std::span<const ExpertView> experts) override;
  std::uint64_t working_bytes(const Largest& largest) const override;
  void reserve(const Largest& largest) override;
  std::optional<std::int32_t> sample(ConstMatrix logits, const SampleSpec& spec) override;

 protected:
  void add_fitting_experts(std::span<const ExpertTask> tasks, DeviceSpan<const float> weights,
                           std::int64_t top_k, ConstMatrix x, Matrix hidden, Matrix out, Matrix y,
                           Phase phase) override;

 private:
  /// Device memory that grows on demand and is kept.
  class Buffer {
   public:
    explicit Buffer(const char* purpose) : purpose_(purpose) {}
    /// True if it lies elsewhere now.
    bool reserve(CudaMemory& source, std::size_t bytes);
    std::byte* memory() const noexcept { return memory_; }
    std::size_t bytes() const noexcept { return bytes_; }
    void release(CudaMemory& source) noexcept;

   private:
    const char* purpose_;
    std::byte* memory_ = nullptr;
    std::size_t bytes_ = 0;
  };
  /// The host's part of a step, on the device: uploaded unless it lies there already.
  class Mirror {
   public:
    explicit Mirror(const char* purpose) : buffer_(purpose) {}
    template <typename T>
    const T* put(CudaDevice& device, std::span<const T> values) {
      return reinterpret_cast<const T*>(put_bytes(device, std::as_bytes(values)));
    }
    void reserve(CudaMemory& source, std::size_t bytes);
    std::byte* memory() const noexcept { return buffer_.memory(); }
    void release(CudaMemory& source) noexcept { buffer_.release(source); }

   private:
    const std::byte* put_bytes(CudaDevice& device, std::span<const std::byte> values);

    Buffer buffer_;
    std::vector<std::byte> held_;
  };

  void check(bool ok) const { cuda_check(plugin_, ok); }
  cuda::Device* opened() const noexcept { return device_->opened(); }
  /// Throws CudaError if what runs now is recorded.
  void refuse_recording(const char* problem) const;
  std::byte* workspace(std::size_t bytes);
  /// Tasks as the plugin takes them, in host_tasks_.
  void translate(std::span<const ExpertTask> tasks);
  /// The rows of `batch` with their blocks on the device.
  cuda::KvRows rows_of(std::span<const SequenceRows> batch);

  const cuda::Plugin& plugin_;
  std::unique_ptr<CudaDevice> device_;
  Buffer workspace_{"the CUDA workspace"};
  Buffer forced_{"the forced experts"};
  Mirror ids_{"the token ids"};
  Mirror rows_{"the rows of a step"};
  Mirror blocks_{"the table of cache blocks"};
  std::vector<cuda::RowPlace> host_rows_;      // of the last batch
  std::vector<std::byte*> host_blocks_;        // of the last batch
  std::vector<std::int64_t> first_blocks_;     // one a sequence of the last batch
  std::vector<raw::ExpertView> host_experts_;  // of the last tasks, or of the last table
  std::vector<raw::ExpertTask> host_tasks_;

  struct SegmentKey {
    std::int64_t part, rows, longest;
    auto operator<=>(const SegmentKey&) const = default;
  };
  // A recording holds addresses: it is good as long as the buffers stay.
  using Buffers = std::array<std::byte*, 4>;
  struct Recording {
    void* graph = nullptr;  // none: the segment has run once, so that all its memory is taken
    Buffers buffers{};
    std::uint64_t last_run = 0;
  };
  Buffers buffers() const {
    return {workspace_.memory(), ids_.memory(), rows_.memory(), blocks_.memory()};
  }
  using Recordings = std::map<SegmentKey, Recording>;
  void run_segment(const SegmentKey& key, const std::function<void()>& body);
  void keep(const SegmentKey& key, void* graph);
  Recordings::iterator forget(Recordings::iterator recording) noexcept;
  void forget_recordings() noexcept;
  Recordings recordings_;
  std::uint64_t segments_run_ = 0;
  bool in_segment_ = false;

  struct ExpertTable {
    std::byte* memory = nullptr;
    std::size_t count = 0;
  };
  std::map<const ExpertView*, ExpertTable> expert_tables_;
};

}  // namespace dsfp4::ops
