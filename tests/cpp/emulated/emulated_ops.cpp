#include "emulated/emulated_ops.h"

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <string>
#include <utility>

#include "dsfp4/error.h"
#include "ops/routing.h"

namespace dsfp4::ops::testing {
namespace {

std::vector<std::int32_t> keep(std::span<const std::int32_t> ids) {
  return {ids.begin(), ids.end()};
}

// The host's numbers, which a GPU's ops check before they are queued.
void require_below(std::span<const std::int32_t> numbers, std::int64_t end, const char* parameter) {
  for (const std::int32_t number : numbers) {
    if (number >= 0 && number < end) continue;
    throw ParameterError(parameter,
                         std::to_string(number) + " is not one of 0.." + std::to_string(end - 1));
  }
}

}  // namespace

EmulatedOps::EmulatedOps(const EmulatedOptions& options)
    : device_(std::make_shared<EmulatedDevice>(options)),
      reference_(make_reference_ops(1)),
      has_routed_experts_(options.routed_experts) {}

EmulatedOps::~EmulatedOps() { device_->run_empty(); }

// ---- the queue and segments

void EmulatedOps::push(const Op& op, std::shared_ptr<const HostInputs> segment) {
  device_->push_op(op.name, [this, body = op.body,
                             segment = std::move(segment)](const EmulatedMemory::Access& memory) {
    Operands in(memory, segment.get());
    body(*reference_, in);
  });
}

void EmulatedOps::op(const char* name, Body body) {
  if (recorded_ != nullptr) {
    recorded_->push_back({name, std::move(body)});
  } else {
    push({name, std::move(body)}, nullptr);
  }
}

Batch EmulatedOps::kept(std::span<const SequenceRows> batch) const {
  Batch kept = keep(batch);
  if (segment_ != nullptr && !same_places(kept, segment_->batch)) {
    throw std::logic_error("an op of a segment has another batch than the segment");
  }
  return kept;
}

EmulatedOps::Key EmulatedOps::key_of(const Segment& segment) {
  auto rows = static_cast<std::int64_t>(segment.ids.size());
  std::int64_t context = kKvBlockTokens;
  for (const SequenceRows& sequence : segment.batch) {
    rows = std::max(rows, sequence.first_row + sequence.rows);
    context = std::max(context, sequence.length());
  }
  context = static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(context)));
  return {segment.part, rows, context};
}

// While a body runs.
class EmulatedOps::Within {
 public:
  Within(EmulatedOps& ops, std::shared_ptr<const HostInputs> segment, std::vector<Op>* recorded)
      : ops_(ops) {
    if (recorded != nullptr) ops.device_->begin_recording();
    ops.segment_ = std::move(segment);
    ops.recorded_ = recorded;
  }
  ~Within() {
    if (ops_.recorded_ != nullptr) ops_.device_->end_recording();
    ops_.segment_ = nullptr;
    ops_.recorded_ = nullptr;
  }
  Within(const Within&) = delete;
  Within& operator=(const Within&) = delete;

 private:
  EmulatedOps& ops_;
};

void EmulatedOps::segment(const Segment& segment, const std::function<void()>& body) {
  if (segment_ != nullptr) throw std::logic_error("a segment inside a segment");
  const auto inputs =
      std::make_shared<const HostInputs>(HostInputs{keep(segment.ids), keep(segment.batch)});
  Recording& recording = recordings_[key_of(segment)];
  if (recording.is_ready) {
    device_->count_replay();
  } else {
    device_->count_body();
    std::vector<Op> ops;
    const bool records = std::exchange(recording.ran, true);
    {
      const Within within(*this, inputs, records ? &ops : nullptr);
      body();
    }
    if (!records) return;
    recording.ops = std::move(ops);
    recording.is_ready = true;
  }
  for (const Op& op : recording.ops) push(op, inputs);
}

// ---- what moves or scales values

void EmulatedOps::embed(const WeightView& table, std::span<const std::int32_t> ids, Matrix out) {
  require_below(ids, table.rows, "ids");
  if (segment_ != nullptr && !std::ranges::equal(ids, segment_->ids)) {
    throw std::logic_error("embed() in a segment has other ids than the segment");
  }
  op("embed", [=, kept = keep(ids)](Ops& reference, Operands& in) {
    reference.embed(in(table), in.ids(kept), in(out));
  });
}

void EmulatedOps::rms_norm(ConstMatrix x, DeviceSpan<const float> weight, float eps, Matrix y) {
  op("rms_norm",
     [=](Ops& reference, Operands& in) { reference.rms_norm(in(x), in(weight), eps, in(y)); });
}

void EmulatedOps::linear(const WeightView& weight, ConstMatrix x, Matrix y, Phase phase,
                         Inputs inputs) {
  op("linear", [=](Ops& reference, Operands& in) {
    reference.linear(in(weight), in(x), in(y), phase, inputs);
  });
}

void EmulatedOps::linear_pair(const WeightView& first, Matrix y_first, const WeightView& second,
                              Matrix y_second, ConstMatrix x, Phase phase) {
  op("linear_pair", [=](Ops& reference, Operands& in) {
    reference.linear_pair(in(first), in(y_first), in(second), in(y_second), in(x), phase);
  });
}

void EmulatedOps::silu_mul(Matrix gate, ConstMatrix up) {
  op("silu_mul", [=](Ops& reference, Operands& in) { reference.silu_mul(in(gate), in(up)); });
}

void EmulatedOps::zero(Matrix y) {
  op("zero", [=](Ops& reference, Operands& in) { reference.zero(in(y)); });
}

void EmulatedOps::add(ConstMatrix x, Matrix y) {
  op("add", [=](Ops& reference, Operands& in) { reference.add(in(x), in(y)); });
}

void EmulatedOps::rope(Matrix x, std::int64_t heads, std::int64_t head_stride,
                       ConstMatrix cos_sin) {
  Matrix all = x;  // to the end of the last head
  all.cols = std::max(x.cols, (heads - 1) * head_stride + cos_sin.cols);
  op("rope", [=](Ops& reference, Operands& in) {
    reference.rope(in(all), heads, head_stride, in(cos_sin));
  });
}

// ---- attention

void EmulatedOps::kv_append(std::span<const SequenceRows> batch, ConstMatrix x) {
  if (batch.empty()) return;
  op("kv_append", [=, rows = kept(batch)](Ops& reference, Operands& in) {
    reference.kv_append(in.batch(rows, x.cols, Cached::kNew), in(x));
  });
}

void EmulatedOps::mla_inputs(const MlaShape& shape, std::span<const SequenceRows> batch,
                             ConstMatrix cos_sin, DeviceSpan<const float> kv_norm, float eps,
                             Matrix q, Matrix kv) {
  if (batch.empty()) return;
  op("mla_inputs", [=, rows = kept(batch)](Ops& reference, Operands& in) {
    reference.mla_inputs(shape, in.batch(rows, shape.cache_width(), Cached::kNew), in(cos_sin),
                         in(kv_norm), eps, in(q), in(kv));
  });
}

void EmulatedOps::prefill_attention(const MlaShape& shape, const WeightView& kv_b_proj,
                                    std::span<const SequenceRows> batch, ConstMatrix q,
                                    Matrix out) {
  if (batch.empty()) return;
  op("prefill_attention", [=, rows = kept(batch)](Ops& reference, Operands& in) {
    reference.prefill_attention(shape, in(kv_b_proj),
                                in.batch(rows, shape.cache_width(), Cached::kAll), in(q), in(out));
  });
}

void EmulatedOps::absorb_query(const MlaShape& shape, const WeightView& kv_b_proj, ConstMatrix q,
                               Matrix q_abs) {
  op("absorb_query", [=](Ops& reference, Operands& in) {
    reference.absorb_query(shape, in(kv_b_proj), in(q), in(q_abs));
  });
}

void EmulatedOps::latent_attention(const MlaShape& shape, std::span<const SequenceRows> batch,
                                   ConstMatrix q_abs, ConstMatrix q, Matrix out) {
  if (batch.empty()) return;
  op("latent_attention", [=, rows = kept(batch)](Ops& reference, Operands& in) {
    reference.latent_attention(shape, in.batch(rows, shape.cache_width(), Cached::kAll), in(q_abs),
                               in(q), in(out));
  });
}

void EmulatedOps::expand_value(const MlaShape& shape, const WeightView& kv_b_proj,
                               ConstMatrix attended, Matrix out) {
  op("expand_value", [=](Ops& reference, Operands& in) {
    reference.expand_value(shape, in(kv_b_proj), in(attended), in(out));
  });
}

// ---- mixture of experts

void EmulatedOps::route(const RouterSpec& spec, ConstMatrix logits, DeviceSpan<const float> bias,
                        std::span<const std::int32_t> forced, Routing out) {
  check_forced(spec, forced);
  if (!forced.empty()) device_->refuse_in_recording("route() with forced experts");
  op("route", [=, kept = keep(forced)](Ops& reference, Operands& in) {
    reference.route(spec, in(logits), in(bias), kept, in(out));
  });
}

void EmulatedOps::experts(std::span<const ExpertTask> tasks, std::int64_t top_k, ConstMatrix x,
                          Matrix hidden, Matrix out, Phase phase) {
  if (tasks.empty()) return;
  device_->refuse_in_recording("experts()");
  op("experts", [=, kept = keep(tasks)](Ops& reference, Operands& in) {
    reference.experts(in.tasks(kept), top_k, in(x), in(hidden), in(out), phase);
  });
}

void EmulatedOps::combine(ConstMatrix pairs, DeviceSpan<const float> weights, std::int64_t top_k,
                          Matrix y) {
  op("combine", [=](Ops& reference, Operands& in) {
    reference.combine(in(pairs), in(weights), top_k, in(y));
  });
}

void EmulatedOps::add_fitting_experts(std::span<const ExpertTask> tasks,
                                      DeviceSpan<const float> weights, std::int64_t top_k,
                                      ConstMatrix x, Matrix hidden, Matrix out, Matrix y,
                                      Phase phase) {
  device_->refuse_in_recording("add_experts()");
  op("add_experts", [=, kept = keep(tasks)](Ops& reference, Operands& in) {
    reference.add_experts(in.tasks(kept), in(weights), top_k, in(x), in(hidden), in(out), in(y),
                          phase);
  });
}

void EmulatedOps::routed_experts(std::span<const ExpertView> experts, const Routing& routing,
                                 std::int64_t top_k, ConstMatrix x, Matrix hidden, Matrix routed,
                                 Matrix y, const ExpertView* shared) {
  if (!has_routed_experts_) throw std::logic_error("routed_experts() of a device that has none");
  if (shared != nullptr) throw std::logic_error("routed_experts() takes no shared expert here");
  if (!prepared_.contains(experts.data())) prepare_experts(experts);
  op("routed_experts", [=, this, key = experts.data()](Ops& reference, Operands& in) {
    const Routing chosen = in(routing);
    reference.experts(in.tasks(tables_.at(key), chosen), top_k, in(x), in(hidden), in(routed),
                      Phase::kDecode);
    reference.combine(in(routed), chosen.weights, top_k, in(y));
  });
}

void EmulatedOps::prepare_experts(std::span<const ExpertView> experts) {
  if (!has_routed_experts_ || experts.empty()) return;
  prepared_.insert(experts.data());
  std::vector<ExpertView> table(experts.begin(), experts.end());
  device_->push_copy(Queue::kCompute, "prepare_experts", experts.size_bytes(),
                     [this, key = experts.data(), table = std::move(table)](
                         const EmulatedMemory::Access&) { tables_[key] = table; });
}

std::optional<std::int32_t> EmulatedOps::sample(ConstMatrix, const SampleSpec&) {
  device_->wait_for_ops("sample()");
  return std::nullopt;
}

}  // namespace dsfp4::ops::testing
