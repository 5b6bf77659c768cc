#include "ops/cuda_backend.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#include "dsfp4/error.h"
#include "ops/cuda/workspaces.h"
#include "ops/cuda_memory.h"
#include "ops/cuda_plugin.h"
#include "ops/host_routing.h"
#include "ops/raw.h"
#include "ops/routing.h"

namespace dsfp4::ops {
namespace {

cuda::DeviceRouting on_device(const Routing& routing) {
  return {unwrap(routing.experts.data), unwrap(routing.used.data), unwrap(routing.weights.data)};
}

}  // namespace

// ---- memory
// --------------------------------------------------------------------------------------

bool CudaBackend::Buffer::reserve(CudaMemory& source, std::size_t bytes) {
  if (bytes <= bytes_) return false;
  release(source);
  memory_ = source.take(bytes, purpose_);
  bytes_ = bytes;
  return true;
}

void CudaBackend::Buffer::release(CudaMemory& source) noexcept {
  if (memory_ != nullptr) source.release(memory_, bytes_);
  memory_ = nullptr;
  bytes_ = 0;
}

void CudaBackend::Mirror::reserve(CudaMemory& source, std::size_t bytes) {
  if (bytes <= buffer_.bytes()) return;
  held_.clear();
  buffer_.reserve(source, bytes);
}

const std::byte* CudaBackend::Mirror::put_bytes(CudaDevice& device,
                                                std::span<const std::byte> values) {
  if (values.size() == held_.size() &&
      (held_.empty() || std::memcmp(values.data(), held_.data(), held_.size()) == 0)) {
    return memory();
  }
  if (device.capturing()) {
    throw CudaError("what a segment does not name cannot be recorded: a recording would keep it");
  }
  held_.clear();
  reserve(device.memory(), std::max(values.size(), kCudaSmallBuffer));
  device.upload(values.data(), memory(), values.size());
  held_.assign(values.begin(), values.end());
  return memory();
}

std::byte* CudaBackend::workspace(std::size_t bytes) {
  if (bytes > workspace_.bytes()) {
    refuse_recording("memory cannot be taken in a recording");
    workspace_.reserve(device_->memory(), bytes);
  }
  return workspace_.memory();
}

CudaBackend::CudaBackend(const cuda::Plugin& plugin, int index, std::uint64_t memory_limit)
    : plugin_(plugin), device_(std::make_unique<CudaDevice>(plugin, index, memory_limit)) {}

CudaBackend::~CudaBackend() {
  plugin_.synchronize(opened());
  forget_recordings();
  CudaMemory& memory = device_->memory();
  for (Buffer* buffer : {&workspace_, &forced_}) buffer->release(memory);
  for (Mirror* mirror : {&ids_, &rows_, &blocks_}) mirror->release(memory);
  for (const auto& [key, table] : expert_tables_) {
    if (table.memory != nullptr) {
      memory.release(table.memory, table.count * sizeof(raw::ExpertView));
    }
  }
}

// ---- segments
// ------------------------------------------------------------------------------------

void CudaBackend::refuse_recording(const char* problem) const {
  if (device_->capturing()) throw CudaError(problem);
}

void CudaBackend::segment(const Segment& segment, const std::function<void()>& body) {
  if (in_segment_) throw std::logic_error("segment() in the body of a segment");
  struct Leave {
    bool& inside;
    ~Leave() { inside = false; }
  };
  in_segment_ = true;
  const Leave leave{in_segment_};
  SegmentKey key{segment.part, static_cast<std::int64_t>(segment.ids.size()), 0};
  if (!segment.ids.empty()) ids_.put(*device_, segment.ids);
  if (!segment.batch.empty()) {
    const cuda::KvRows kv = rows_of(segment.batch);
    key.rows = std::max(key.rows, kv.count);
    key.longest = rounded_length(kv.max_length);
  }
  run_segment(key, body);
}

void CudaBackend::run_segment(const SegmentKey& key, const std::function<void()>& body) {
  auto found = recordings_.find(key);
  if (found != recordings_.end() && found->second.graph != nullptr) {
    if (found->second.buffers == buffers()) {
      found->second.last_run = ++segments_run_;
      check(plugin_.launch_graph(opened(), found->second.graph));
      return;
    }
    forget(found);
    found = recordings_.end();
  }
  if (found == recordings_.end()) {
    body();  // to its end, so that the next time finds all memory taken
    keep(key, nullptr);
    return;
  }
  forget(found);  // until it has been recorded
  void* graph = nullptr;
  {
    CudaDevice::Capture capture(*device_);
    body();
    graph = capture.end();
  }
  keep(key, graph);
  check(plugin_.launch_graph(opened(), graph));
}

void CudaBackend::keep(const SegmentKey& key, void* graph) {
  // Keys without a graph count, too: where more segments take turns than are kept, none of them is
  // recorded over and over.
  if (recordings_.size() >= kMostRecordings) {
    forget(std::ranges::min_element(recordings_, {},
                                    [](const auto& entry) { return entry.second.last_run; }));
  }
  recordings_[key] = {graph, buffers(), ++segments_run_};
}

// CUDA frees a graph that is still running once it has run.
CudaBackend::Recordings::iterator CudaBackend::forget(Recordings::iterator recording) noexcept {
  void* graph = recording->second.graph;
  if (graph != nullptr) plugin_.free_graph(opened(), graph);
  return recordings_.erase(recording);
}

void CudaBackend::forget_recordings() noexcept {
  for (auto at = recordings_.begin(); at != recordings_.end();) at = forget(at);
}

// ---- what moves or scales values
// -----------------------------------------------------------------

void CudaBackend::embed(const WeightView& table, std::span<const std::int32_t> ids, Matrix out) {
  for (std::size_t t = 0; t < ids.size(); ++t) {
    if (ids[t] < 0 || ids[t] >= table.rows) {
      throw ParameterError("ids", "token id " + std::to_string(ids[t]) + " at position " +
                                      std::to_string(t) + " is outside the vocabulary of " +
                                      std::to_string(table.rows));
    }
  }
  const format::WeightView from = unwrap(table);
  check(plugin_.embed(opened(), &from, ids_.put(*device_, ids), unwrap(out)));
}

void CudaBackend::rms_norm(ConstMatrix x, DeviceSpan<const float> weight, float eps, Matrix y) {
  check(plugin_.rms_norm(opened(), unwrap(x), unwrap(weight.data), eps, unwrap(y)));
}

void CudaBackend::linear(const WeightView& weight, ConstMatrix x, Matrix y, Phase /*phase*/,
                         Inputs inputs) {
  const format::WeightView w = unwrap(weight);
  std::byte* space = workspace(cuda::linear_workspace(w.cols, x.rows));
  check(plugin_.linear(opened(), &w, unwrap(x), unwrap(y), inputs, space));
}

void CudaBackend::linear_pair(const WeightView& first, Matrix y_first, const WeightView& second,
                              Matrix y_second, ConstMatrix x, Phase /*phase*/) {
  const format::WeightView a = unwrap(first);
  const format::WeightView b = unwrap(second);
  std::byte* space = workspace(cuda::linear_workspace(std::max(a.cols, b.cols), x.rows));
  check(plugin_.linear_pair(opened(), &a, unwrap(y_first), &b, unwrap(y_second), unwrap(x), space));
}

void CudaBackend::silu_mul(Matrix gate, ConstMatrix up) {
  check(plugin_.silu_mul(opened(), unwrap(gate), unwrap(up)));
}

void CudaBackend::zero(Matrix y) { check(plugin_.zero(opened(), unwrap(y))); }

void CudaBackend::add(ConstMatrix x, Matrix y) {
  check(plugin_.add(opened(), unwrap(x), unwrap(y)));
}

void CudaBackend::rope(Matrix x, std::int64_t heads, std::int64_t head_stride,
                       ConstMatrix cos_sin) {
  check(plugin_.rope(opened(), unwrap(x), heads, head_stride, unwrap(cos_sin)));
}

// ---- attention
// -----------------------------------------------------------------------------------

cuda::KvRows CudaBackend::rows_of(std::span<const SequenceRows> batch) {
  host_rows_.clear();
  host_blocks_.clear();
  first_blocks_.clear();
  cuda::KvRows kv;
  for (const SequenceRows& sequence : batch) {
    const auto first = static_cast<std::int64_t>(host_blocks_.size());
    first_blocks_.push_back(first);
    for (const DevicePtr<std::byte> block : sequence.kv.blocks) {
      host_blocks_.push_back(unwrap(block));
    }
    if (static_cast<std::int64_t>(host_rows_.size()) < sequence.first_row + sequence.rows) {
      host_rows_.resize(static_cast<std::size_t>(sequence.first_row + sequence.rows));
    }
    for (std::int64_t r = 0; r < sequence.rows; ++r) {
      host_rows_[static_cast<std::size_t>(sequence.first_row + r)] = {
          static_cast<std::int32_t>(sequence.position + r), static_cast<std::int32_t>(first)};
    }
    kv.max_length = std::max(kv.max_length, sequence.length());
  }
  // The layers of a step share them.
  kv.rows = rows_.put(*device_, std::span<const cuda::RowPlace>(host_rows_));
  kv.blocks = blocks_.put(*device_, std::span<std::byte* const>(host_blocks_));
  kv.count = static_cast<std::int64_t>(host_rows_.size());
  kv.layer_offset = batch.front().kv.layer_offset;
  kv.format = batch.front().kv.format;
  kv.scale = batch.front().kv.scale;
  return kv;
}

void CudaBackend::kv_append(std::span<const SequenceRows> batch, ConstMatrix x) {
  if (batch.empty()) return;
  const cuda::KvRows kv = rows_of(batch);
  check(plugin_.kv_append(opened(), &kv, unwrap(x)));
}

void CudaBackend::mla_inputs(const MlaShape& shape, std::span<const SequenceRows> batch,
                             ConstMatrix cos_sin, DeviceSpan<const float> kv_norm, float eps,
                             Matrix q, Matrix kv) {
  if (batch.empty()) return;
  const cuda::KvRows rows = rows_of(batch);
  check(plugin_.mla_inputs(opened(), &shape, &rows, unwrap(cos_sin), unwrap(kv_norm.data), eps,
                           unwrap(q), unwrap(kv)));
}

void CudaBackend::prefill_attention(const MlaShape& shape, const WeightView& kv_b_proj,
                                    std::span<const SequenceRows> batch, ConstMatrix q,
                                    Matrix out) {
  if (batch.empty()) return;
  refuse_recording("prefill_attention() cannot be recorded: a recording would keep its positions");
  const cuda::KvRows kv = rows_of(batch);
  const format::WeightView weight = unwrap(kv_b_proj);
  std::byte* space = workspace(cuda::prefill_workspace(shape, kv.max_length));
  for (std::size_t i = 0; i < batch.size(); ++i) {
    const cuda::SequencePart part{batch[i].first_row, batch[i].rows, batch[i].position,
                                  first_blocks_[i]};
    check(plugin_.prefill_attention(opened(), &shape, &weight, &kv, part, unwrap(q), unwrap(out),
                                    space));
  }
}

void CudaBackend::absorb_query(const MlaShape& shape, const WeightView& kv_b_proj, ConstMatrix q,
                               Matrix q_abs) {
  const format::WeightView weight = unwrap(kv_b_proj);
  check(plugin_.absorb_query(opened(), &shape, &weight, unwrap(q), unwrap(q_abs)));
}

void CudaBackend::latent_attention(const MlaShape& shape, std::span<const SequenceRows> batch,
                                   ConstMatrix q_abs, ConstMatrix q, Matrix out) {
  if (batch.empty()) return;
  cuda::KvRows kv = rows_of(batch);
  kv.max_length = rounded_length(kv.max_length);
  std::byte* space = workspace(cuda::latent_workspace(shape, kv.count, kv.max_length));
  check(plugin_.latent_attention(opened(), &shape, &kv, unwrap(q_abs), unwrap(q), unwrap(out),
                                 space));
}

void CudaBackend::expand_value(const MlaShape& shape, const WeightView& kv_b_proj,
                               ConstMatrix attended, Matrix out) {
  const format::WeightView weight = unwrap(kv_b_proj);
  check(plugin_.expand_value(opened(), &shape, &weight, unwrap(attended), unwrap(out)));
}

// ---- mixture of experts
// --------------------------------------------------------------------------

void CudaBackend::route(const RouterSpec& spec, ConstMatrix logits, DeviceSpan<const float> bias,
                        std::span<const std::int32_t> forced, Routing out) {
  check_router(spec, static_cast<std::size_t>(logits.cols), bias.size);
  check_forced(spec, forced);
  if (!forced.empty()) {
    refuse_recording("forced experts cannot be recorded: a recording would keep them");
    forced_.reserve(device_->memory(), forced.size_bytes());
    device_->upload(forced.data(), forced_.memory(), forced.size_bytes());
  }
  check(plugin_.route(
      opened(), &spec, unwrap(logits), bias.empty() ? nullptr : unwrap(bias.data),
      forced.empty() ? nullptr : reinterpret_cast<const std::int32_t*>(forced_.memory()),
      on_device(out)));
}

void CudaBackend::translate(std::span<const ExpertTask> tasks) {
  host_experts_.clear();
  host_tasks_.clear();
  for (const ExpertTask& task : tasks) host_experts_.push_back(unwrap(*task.expert));
  for (std::size_t t = 0; t < tasks.size(); ++t) {
    host_tasks_.push_back({&host_experts_[t], tasks[t].pairs});
  }
}

void CudaBackend::experts(std::span<const ExpertTask> tasks, std::int64_t top_k, ConstMatrix x,
                          Matrix hidden, Matrix out, Phase /*phase*/) {
  if (tasks.empty()) return;
  refuse_recording("experts() cannot be recorded: a recording would keep its tasks");
  translate(tasks);
  const auto count = static_cast<std::int64_t>(tasks.size());
  std::byte* space =
      workspace(cuda::expert_tasks_workspace(host_experts_.front(), count, x.rows, top_k));
  check(plugin_.expert_tasks(opened(), host_tasks_.data(), count, top_k, unwrap(x), unwrap(hidden),
                             unwrap(out), space));
}

void CudaBackend::add_fitting_experts(std::span<const ExpertTask> tasks,
                                      DeviceSpan<const float> weights, std::int64_t top_k,
                                      ConstMatrix x, Matrix hidden, Matrix out, Matrix y,
                                      Phase /*phase*/) {
  refuse_recording("add_experts() cannot be recorded: a recording would keep its tasks");
  translate(tasks);
  const auto count = static_cast<std::int64_t>(tasks.size());
  std::byte* space =
      workspace(cuda::add_expert_tasks_workspace(host_experts_.front(), count, out.rows));
  check(plugin_.add_expert_tasks(opened(), host_tasks_.data(), count, top_k, unwrap(x),
                                 unwrap(weights.data), unwrap(hidden), unwrap(out), unwrap(y),
                                 space));
}

void CudaBackend::combine(ConstMatrix pairs, DeviceSpan<const float> weights, std::int64_t top_k,
                          Matrix y) {
  check(plugin_.combine(opened(), unwrap(pairs), unwrap(weights.data), top_k, unwrap(y)));
}

void CudaBackend::prepare_experts(std::span<const ExpertView> experts) {
  if (experts.empty()) return;
  refuse_recording("prepare_experts() cannot be recorded: it is not an op");
  ExpertTable& table = expert_tables_[experts.data()];
  if (table.memory != nullptr && table.count != experts.size()) {
    forget_recordings();  // which read it where it lies
    device_->memory().release(table.memory, table.count * sizeof(raw::ExpertView));
    table = {};
  }
  const std::size_t bytes = experts.size() * sizeof(raw::ExpertView);
  if (table.memory == nullptr) {
    table = {device_->memory().take(bytes, "the table of experts"), experts.size()};
  }
  host_experts_.clear();
  for (const ExpertView& expert : experts) host_experts_.push_back(unwrap(expert));
  device_->upload(host_experts_.data(), table.memory, bytes);
}

void CudaBackend::routed_experts(std::span<const ExpertView> experts, const Routing& routing,
                                 std::int64_t top_k, ConstMatrix x, Matrix hidden, Matrix routed,
                                 Matrix y, const ExpertView* shared) {
  const ExpertTable& table = expert_tables_[experts.data()];
  if (table.memory == nullptr) prepare_experts(experts);
  const raw::ExpertView first = unwrap(experts.front());
  const raw::ExpertView with = shared == nullptr ? raw::ExpertView{} : unwrap(*shared);
  const auto count = static_cast<std::int64_t>(experts.size());
  std::byte* space = workspace(cuda::experts_workspace(first, count, x.rows, top_k));
  check(plugin_.routed_experts(opened(), reinterpret_cast<const raw::ExpertView*>(table.memory),
                               &first, count, on_device(routing), top_k, unwrap(x), unwrap(hidden),
                               unwrap(routed), unwrap(y), shared == nullptr ? nullptr : &with,
                               space));
}

bool CudaBackend::takes_shared(std::span<const ExpertView> experts, const ExpertView& shared,
                               std::int64_t tokens, std::int64_t top_k) const {
  if (experts.empty()) return false;
  const raw::ExpertView first = unwrap(experts.front());
  const raw::ExpertView with = unwrap(shared);
  return plugin_.takes_shared(opened(), &first, &with, tokens, top_k);
}

// ---- the next token, and memory for all of it
// ----------------------------------------------------

std::optional<std::int32_t> CudaBackend::sample(ConstMatrix logits, const SampleSpec& spec) {
  refuse_recording("sample() cannot be recorded: the host waits for it");
  std::int32_t id = -1;
  std::byte* space = workspace(cuda::sample_workspace(logits.cols));
  check(plugin_.sample(opened(), unwrap(logits), &spec, space, &id));
  return id;
}

std::uint64_t CudaBackend::working_bytes(const Largest& largest) const {
  return cuda_working_bytes(largest);
}

void CudaBackend::reserve(const Largest& largest) {
  const CudaStepMemory memory = cuda_step_memory(largest);
  workspace(memory.workspace);
  ids_.reserve(device_->memory(), memory.ids);
  rows_.reserve(device_->memory(), memory.rows);
  blocks_.reserve(device_->memory(), memory.blocks);
  forced_.reserve(device_->memory(), memory.forced);
}

std::unique_ptr<Ops> make_cuda_ops(int index, std::uint64_t memory_limit) {
  return std::make_unique<CudaBackend>(cuda_plugin(), index, memory_limit);
}

}  // namespace dsfp4::ops
