// The ops of the emulated device: the arithmetic of `reference`, behind a queue, a wall between
// host and device, and recorded segments, as on a GPU.
#pragma once

#include <compare>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string_view>
#include <vector>

#include "emulated/emulated_device.h"
#include "emulated/operands.h"
#include "ops/ops.h"

namespace dsfp4::ops::testing {

class EmulatedOps final : public Ops {
 public:
  explicit EmulatedOps(const EmulatedOptions& options = {});
  /// Lets the queues run empty.
  ~EmulatedOps() override;

  /// It may outlive the ops: then it still knows what was not given back.
  const std::shared_ptr<EmulatedDevice>& emulated() const { return device_; }

  std::string_view name() const override { return "emulated"; }
  KvFormat default_kv_format() const override { return reference_->default_kv_format(); }
  Device& device() const override { return *device_; }

  /// The first run of a part with so many rows and so long a context runs `body`, the second runs
  /// and records it, the others run what was recorded. Throws std::logic_error where an op of
  /// `body` takes other ids or another batch than the segment names.
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
  void route(const RouterSpec& spec, ConstMatrix logits, DeviceSpan<const float> bias,
             std::span<const std::int32_t> forced, Routing out) override;
  void experts(std::span<const ExpertTask> tasks, std::int64_t top_k, ConstMatrix x, Matrix hidden,
               Matrix out, Phase phase) override;
  void combine(ConstMatrix pairs, DeviceSpan<const float> weights, std::int64_t top_k,
               Matrix y) override;
  bool has_routed_experts() const override { return has_routed_experts_; }
  void routed_experts(std::span<const ExpertView> experts, const Routing& routing,
                      std::int64_t top_k, ConstMatrix x, Matrix hidden, Matrix routed, Matrix y,
                      const ExpertView* shared) override;
  /// As on a GPU, routed_experts() works with what this was told last, in recordings too.
  void prepare_experts(std::span<const ExpertView> experts) override;
  /// Waits as a GPU's would, and leaves the choice to the host.
  std::optional<std::int32_t> sample(ConstMatrix logits, const SampleSpec& spec) override;

 protected:
  void add_fitting_experts(std::span<const ExpertTask> tasks, DeviceSpan<const float> weights,
                           std::int64_t top_k, ConstMatrix x, Matrix hidden, Matrix out, Matrix y,
                           Phase phase) override;

 private:
  using Body = std::function<void(Ops& reference, Operands& in)>;
  struct Op {
    const char* name;
    Body body;
  };
  struct Key {
    std::int64_t part, rows, context;
    auto operator<=>(const Key&) const = default;
  };
  struct Recording {
    bool ran = false;
    bool is_ready = false;
    std::vector<Op> ops;
  };
  class Within;

  static Key key_of(const Segment& segment);
  /// Queues an op, or keeps it while a segment is recorded.
  void op(const char* name, Body body);
  void push(const Op& op, std::shared_ptr<const HostInputs> segment);
  Batch kept(std::span<const SequenceRows> batch) const;

  std::shared_ptr<EmulatedDevice> device_;
  std::unique_ptr<Ops> reference_;
  const bool has_routed_experts_;
  std::map<Key, Recording> recordings_;
  std::shared_ptr<const HostInputs> segment_;  // whose body runs now
  std::vector<Op>* recorded_ = nullptr;        // what it is recorded to
  std::set<const ExpertView*> prepared_;
  std::map<const ExpertView*, std::vector<ExpertView>> tables_;  // the compute queue's
};

}  // namespace dsfp4::ops::testing
