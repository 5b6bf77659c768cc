#include "ops/cuda_backend.h"

#include <algorithm>
#include <bit>
#include <map>
#include <mutex>
#include <string>

#include "dsfp4/error.h"
#include "ops/cuda_plugin.h"
#include "ops/routing.h"

namespace dsfp4::ops {
namespace {

// Left for what the driver takes on its own: kernels loaded at their first use, local memory.
constexpr std::uint64_t kDriverReserve = 64u << 20;
constexpr std::size_t kSmallBuffer = 64u << 10;

cuda::DeviceRouting on_device(const Routing& routing) {
  return {routing.experts.data(), routing.used.data(), routing.weights.data()};
}

// What this process's context on a device takes: measured when it is made, by the first backend,
// and kept as long as the process. Where that cannot be measured, a generous guess.
std::uint64_t context_bytes(int index, std::uint64_t free_before, std::uint64_t free_after) {
  static std::mutex guard;
  static std::map<int, std::uint64_t> known;
  constexpr std::uint64_t kGuess = 600'000'000;
  const std::lock_guard lock(guard);
  const std::uint64_t measured =
      free_before == 0 ? kGuess : free_before - std::min(free_before, free_after);
  return known.emplace(index, measured).first->second;
}

CudaAccount& account_of(int index) {
  static std::mutex guard;
  static std::map<int, CudaAccount> accounts;
  const std::lock_guard lock(guard);
  return accounts[index];
}

}  // namespace

void cuda_check(const cuda::Plugin& plugin, bool ok) {
  if (ok) return;
  const cuda::Failure& failure = *plugin.failure();
  throw CudaError(failure.problem, failure.code, failure.call, failure.source, failure.line);
}

// ---- memory
// --------------------------------------------------------------------------------------

std::size_t CudaMemory::available() const noexcept {
  const std::lock_guard lock(account_.mutex);
  return available_locked();
}

std::size_t CudaMemory::available_locked() const noexcept {
  std::uint64_t free = 0;
  std::uint64_t total = 0;
  if (!plugin_.memory(device_, &free, &total)) return 0;
  if (limit_ == 0) return free > kDriverReserve ? free - kDriverReserve : 0;
  const std::uint64_t taken = context_bytes_ + account_.used + kDriverReserve;
  return std::min(free, limit_ > taken ? limit_ - taken : 0);
}

std::byte* CudaMemory::allocate(std::size_t bytes) noexcept {
  const std::lock_guard lock(account_.mutex);
  if (bytes > available_locked()) return nullptr;
  std::byte* memory = nullptr;
  if (!plugin_.allocate(device_, bytes, &memory)) return nullptr;
  account_.used += bytes;
  return memory;
}

void CudaMemory::release(std::byte* memory, std::size_t bytes) noexcept {
  plugin_.free(device_, memory);
  const std::lock_guard lock(account_.mutex);
  account_.used -= bytes;
}

std::byte* CudaMemory::take(std::size_t bytes, const char* purpose) {
  std::byte* memory = allocate(bytes);
  if (memory == nullptr) throw MemoryLimitError(purpose, bytes, available(), "", name());
  return memory;
}

std::byte* CudaBackend::Buffer::reserve(CudaMemory& source, std::size_t bytes) {
  if (bytes <= bytes_) return memory_;
  release(source);
  memory_ = source.take(bytes, purpose_);
  bytes_ = bytes;
  return memory_;
}

void CudaBackend::Buffer::release(CudaMemory& source) noexcept {
  if (memory_ != nullptr) source.release(memory_, bytes_);
  memory_ = nullptr;
  bytes_ = 0;
}

OpenDevice::OpenDevice(const cuda::Plugin& plugin, int index, bool portable) : plugin_(plugin) {
  cuda_check(plugin, plugin.open(index, portable, &device_));
}

CudaBackend::CudaBackend(const cuda::Plugin& plugin, int index, std::uint64_t memory_limit)
    : CudaBackend(plugin, index, memory_limit, cuda_device(plugin, index).free_bytes) {}

CudaBackend::CudaBackend(const cuda::Plugin& plugin, int index, std::uint64_t memory_limit,
                         std::uint64_t free_before)
    : plugin_(plugin), device_(plugin, index, cuda_kernels_are_portable()) {
  std::uint64_t free = 0;
  std::uint64_t total = 0;
  check(plugin_.memory(device_, &free, &total));
  const std::uint64_t context = context_bytes(index, free_before, free);
  if (memory_limit != 0 && context + kDriverReserve > memory_limit) {
    throw MemoryLimitError("the CUDA context and its reserve", context + kDriverReserve,
                           memory_limit, "", "VRAM");
  }
  device_memory_ =
      std::make_unique<CudaMemory>(plugin_, device_, account_of(index), memory_limit, context);
}

CudaBackend::~CudaBackend() {
  plugin_.synchronize(device_);
  for (auto& [key, recording] : recordings_) forget(recording);
  for (Buffer* buffer : {&workspace_, &ids_, &forced_, &rows_, &blocks_}) {
    buffer->release(*device_memory_);
  }
  for (const auto& [key, table] : expert_tables_) {
    device_memory_->release(table, expert_counts_[key] * sizeof(ExpertView));
  }
}

void CudaBackend::upload(const void* from, void* to, std::size_t bytes) {
  check(plugin_.upload(device_, from, to, bytes));
}

void CudaBackend::download(const void* from, void* to, std::size_t bytes) {
  check(plugin_.download(device_, from, to, bytes));
}

// ---- recorded steps
// -------------------------------------------------------------------------------

void CudaBackend::forget(Recording& recording) noexcept {
  if (recording.graph != nullptr) plugin_.free_graph(device_, recording.graph);
  recording.graph = nullptr;
}

Backend::StepRecording CudaBackend::begin_recorded(std::span<const std::int32_t> ids,
                                                   std::span<const SequenceRows> batch) {
  std::byte* on_gpu = ids_.reserve(*device_memory_, std::max(ids.size_bytes(), kSmallBuffer));
  upload(ids.data(), on_gpu, ids.size_bytes());
  const cuda::KvRows kv = rows_of(batch);
  recording_ = &recordings_[{kv.count, kv.max_length}];
  if (recording_->graph != nullptr && recording_->buffers != buffers()) {
    forget(*recording_);
    recording_->steps = 0;
  }
  if (recording_->graph != nullptr) {
    check(plugin_.launch_graph(device_, recording_->graph));
    return StepRecording::kReplayed;
  }
  // The first runs as it is, to its end, so that the next finds all memory taken.
  if (recording_->steps++ == 0) return StepRecording::kBegun;
  check(plugin_.begin_capture(device_));
  capturing_ = true;
  return StepRecording::kBegun;
}

void CudaBackend::drop_recorded() noexcept {
  if (!capturing_) return;
  capturing_ = false;
  void* graph = nullptr;
  if (plugin_.end_capture(device_, &graph)) plugin_.free_graph(device_, graph);
}

void CudaBackend::end_recorded() {
  if (!capturing_) return;
  capturing_ = false;
  check(plugin_.end_capture(device_, &recording_->graph));
  recording_->buffers = buffers();
  check(plugin_.launch_graph(device_, recording_->graph));
}

// ---- what moves or scales values
// -----------------------------------------------------------------

void CudaBackend::embed(const format::WeightView& table, std::span<const std::int32_t> ids,
                        Matrix out) {
  for (std::size_t t = 0; t < ids.size(); ++t) {
    if (ids[t] < 0 || ids[t] >= table.rows) {
      throw ParameterError("ids", "token id " + std::to_string(ids[t]) + " at position " +
                                      std::to_string(t) + " is outside the vocabulary of " +
                                      std::to_string(table.rows));
    }
  }
  std::byte* on_gpu = ids_.reserve(*device_memory_, std::max(ids.size_bytes(), kSmallBuffer));
  if (!capturing_) upload(ids.data(), on_gpu, ids.size_bytes());
  check(plugin_.embed(device_, &table, reinterpret_cast<const std::int32_t*>(on_gpu), out));
}

void CudaBackend::rms_norm(ConstMatrix x, std::span<const float> weight, float eps, Matrix y) {
  check(plugin_.rms_norm(device_, x, weight.data(), eps, y));
}

void CudaBackend::linear(const format::WeightView& weight, ConstMatrix x, Matrix y, Inputs inputs) {
  std::byte* space = workspace(plugin_.linear_workspace(device_, &weight, x.rows));
  check(plugin_.linear(device_, &weight, x, y, inputs, space));
}

void CudaBackend::linear_pair(const format::WeightView& first, Matrix y_first,
                              const format::WeightView& second, Matrix y_second, ConstMatrix x) {
  std::byte* space = workspace(std::max(plugin_.linear_workspace(device_, &first, x.rows),
                                        plugin_.linear_workspace(device_, &second, x.rows)));
  check(plugin_.linear_pair(device_, &first, y_first, &second, y_second, x, space));
}

void CudaBackend::silu_mul(Matrix gate, ConstMatrix up) {
  check(plugin_.silu_mul(device_, gate, up));
}

void CudaBackend::zero(Matrix y) { check(plugin_.zero(device_, y)); }

void CudaBackend::add(ConstMatrix x, Matrix y) { check(plugin_.add(device_, x, y)); }

void CudaBackend::rope(Matrix x, std::int64_t heads, std::int64_t head_stride,
                       ConstMatrix cos_sin) {
  check(plugin_.rope(device_, x, heads, head_stride, cos_sin));
}

// ---- attention
// -----------------------------------------------------------------------------------

cuda::KvRows CudaBackend::rows_of(std::span<const SequenceRows> batch) {
  std::vector<cuda::RowPlace> rows;
  std::vector<std::byte*> blocks;
  first_blocks_.clear();
  cuda::KvRows kv;
  for (const SequenceRows& sequence : batch) {
    const auto first = static_cast<std::int64_t>(blocks.size());
    first_blocks_.push_back(first);
    blocks.insert(blocks.end(), sequence.kv.blocks.begin(), sequence.kv.blocks.end());
    if (static_cast<std::int64_t>(rows.size()) < sequence.first_row + sequence.rows) {
      rows.resize(static_cast<std::size_t>(sequence.first_row + sequence.rows));
    }
    for (std::int64_t r = 0; r < sequence.rows; ++r) {
      rows[static_cast<std::size_t>(sequence.first_row + r)] = {
          static_cast<std::int32_t>(sequence.position + r), static_cast<std::int32_t>(first)};
    }
    kv.max_length = std::max(kv.max_length, sequence.length());
  }
  const std::size_t row_bytes = rows.size() * sizeof(cuda::RowPlace);
  const std::size_t block_bytes = blocks.size() * sizeof(std::byte*);
  std::byte* on_gpu_rows = rows_.reserve(*device_memory_, std::max(row_bytes, kSmallBuffer));
  std::byte* on_gpu_blocks = blocks_.reserve(*device_memory_, std::max(block_bytes, kSmallBuffer));
  const auto same_row = [](const cuda::RowPlace& a, const cuda::RowPlace& b) {
    return a.position == b.position && a.first_block == b.first_block;
  };
  if (!std::ranges::equal(rows, host_rows_, same_row)) {  // the layers of a step share them
    upload(rows.data(), on_gpu_rows, row_bytes);
    host_rows_ = rows;
  }
  if (blocks != host_blocks_) {
    upload(reinterpret_cast<const std::byte*>(blocks.data()), on_gpu_blocks, block_bytes);
    host_blocks_ = std::move(blocks);
  }
  if (phase_ == Phase::kDecode) {  // a recording is good up to the next power of two
    kv.max_length = static_cast<std::int64_t>(
        std::bit_ceil(static_cast<std::uint64_t>(std::max(kv.max_length, kKvBlockTokens))));
  }
  kv.rows = reinterpret_cast<const cuda::RowPlace*>(on_gpu_rows);
  kv.blocks = reinterpret_cast<std::byte* const*>(on_gpu_blocks);
  kv.count = static_cast<std::int64_t>(rows.size());
  kv.layer_offset = batch.front().kv.layer_offset;
  kv.format = batch.front().kv.format;
  kv.scale = batch.front().kv.scale;
  return kv;
}

void CudaBackend::kv_append(std::span<const SequenceRows> batch, ConstMatrix x) {
  if (batch.empty()) return;
  const cuda::KvRows kv = rows_of(batch);
  check(plugin_.kv_append(device_, &kv, x));
}

void CudaBackend::mla_inputs(const MlaShape& shape, std::span<const SequenceRows> batch,
                             ConstMatrix cos_sin, std::span<const float> kv_norm, float eps,
                             Matrix q, Matrix kv) {
  if (batch.empty()) return;
  const cuda::KvRows rows = rows_of(batch);
  check(plugin_.mla_inputs(device_, &shape, &rows, cos_sin, kv_norm.data(), eps, q, kv));
}

void CudaBackend::prefill_attention(const MlaShape& shape, const format::WeightView& kv_b_proj,
                                    std::span<const SequenceRows> batch, ConstMatrix q,
                                    Matrix out) {
  if (batch.empty()) return;
  const cuda::KvRows kv = rows_of(batch);
  std::byte* space = workspace(plugin_.prefill_workspace(device_, &shape, kv.max_length, q.rows));
  for (std::size_t i = 0; i < batch.size(); ++i) {
    const cuda::SequencePart part{batch[i].first_row, batch[i].rows, batch[i].position,
                                  first_blocks_[i]};
    check(plugin_.prefill_attention(device_, &shape, &kv_b_proj, &kv, part, q, out, space));
  }
}

void CudaBackend::absorb_query(const MlaShape& shape, const format::WeightView& kv_b_proj,
                               ConstMatrix q, Matrix q_abs) {
  check(plugin_.absorb_query(device_, &shape, &kv_b_proj, q, q_abs));
}

void CudaBackend::latent_attention(const MlaShape& shape, std::span<const SequenceRows> batch,
                                   ConstMatrix q_abs, ConstMatrix q, Matrix out) {
  if (batch.empty()) return;
  const cuda::KvRows kv = rows_of(batch);
  std::byte* space = workspace(plugin_.latent_workspace(device_, &shape, kv.count, kv.max_length));
  check(plugin_.latent_attention(device_, &shape, &kv, q_abs, q, out, space));
}

void CudaBackend::expand_value(const MlaShape& shape, const format::WeightView& kv_b_proj,
                               ConstMatrix attended, Matrix out) {
  check(plugin_.expand_value(device_, &shape, &kv_b_proj, attended, out));
}

// ---- mixture of experts
// --------------------------------------------------------------------------

void CudaBackend::route(const RouterSpec& spec, ConstMatrix logits, std::span<const float> bias,
                        std::span<const std::int32_t> forced, Routing out) {
  check_router(spec, static_cast<std::size_t>(logits.cols), bias.size());
  for (const std::int32_t e : forced) {
    if (e < 0 || e >= spec.experts) {
      throw ParameterError("experts", "expert " + std::to_string(e) + " is not one of 0.." +
                                          std::to_string(spec.experts - 1));
    }
  }
  const std::int32_t* forced_on_gpu = nullptr;
  if (!forced.empty()) {
    std::byte* to = forced_.reserve(*device_memory_, forced.size_bytes());
    upload(forced.data(), to, forced.size_bytes());
    forced_on_gpu = reinterpret_cast<const std::int32_t*>(to);
  }
  check(plugin_.route(device_, &spec, logits, bias.empty() ? nullptr : bias.data(), forced_on_gpu,
                      on_device(out)));
}

void CudaBackend::experts(std::span<const ExpertTask> tasks, std::int64_t top_k, ConstMatrix x,
                          Matrix hidden, Matrix out) {
  if (tasks.empty()) return;
  if (capturing_) throw CudaError("experts() cannot be recorded: a recording would keep its tasks");
  const auto count = static_cast<std::int64_t>(tasks.size());
  std::byte* space = workspace(
      plugin_.expert_tasks_workspace(device_, tasks.front().expert, count, x.rows, top_k));
  check(plugin_.expert_tasks(device_, tasks.data(), count, top_k, x, hidden, out, space));
}

void CudaBackend::combine(ConstMatrix pairs, std::span<const float> weights, std::int64_t top_k,
                          Matrix y) {
  check(plugin_.combine(device_, pairs, weights.data(), top_k, y));
}

std::optional<std::int32_t> CudaBackend::sample(ConstMatrix logits, const SampleSpec& spec) {
  std::int32_t id = -1;
  std::byte* space = workspace(plugin_.sample_workspace(device_, logits.cols));
  check(plugin_.sample(device_, logits, &spec, space, &id));
  return id;
}

CudaBackend::StepMemory CudaBackend::step_memory(const Largest& largest) const {
  const auto rows = static_cast<std::size_t>(largest.rows);
  const auto longest = static_cast<std::int64_t>(
      std::bit_ceil(static_cast<std::uint64_t>(std::max(largest.context, kKvBlockTokens))));
  constexpr std::size_t kBf16 = 2;
  std::size_t bytes = rows * static_cast<std::size_t>(largest.width) * kBf16;
  bytes = std::max(bytes,
                   plugin_.prefill_workspace(device_, &largest.mla, largest.context, largest.rows));
  bytes = std::max(bytes, plugin_.latent_workspace(device_, &largest.mla, 1, longest));
  if (!largest.experts.empty()) {
    const auto experts = static_cast<std::int64_t>(largest.experts.size());
    for (const auto workspace_of : {plugin_.experts_workspace, plugin_.expert_tasks_workspace}) {
      bytes = std::max(bytes, workspace_of(device_, largest.experts.data(), experts, largest.rows,
                                           largest.top_k));
    }
  }
  bytes =
      std::max(bytes, plugin_.sample_workspace(device_, std::max<std::int64_t>(largest.vocab, 1)));
  const auto blocks = static_cast<std::size_t>(largest.context / kKvBlockTokens + 1);
  return {bytes, std::max(rows * sizeof(std::int32_t), kSmallBuffer),
          std::max(rows * sizeof(cuda::RowPlace), kSmallBuffer),
          std::max(blocks * sizeof(std::byte*), kSmallBuffer)};
}

std::uint64_t CudaBackend::working_bytes(const Largest& largest) const {
  const StepMemory memory = step_memory(largest);
  const std::uint64_t tables =
      static_cast<std::uint64_t>(largest.moe_layers) * largest.experts.size_bytes();
  return memory.workspace + memory.ids + memory.rows + memory.blocks + tables;
}

void CudaBackend::reserve(const Largest& largest) {
  const StepMemory memory = step_memory(largest);
  workspace(memory.workspace);
  ids_.reserve(*device_memory_, memory.ids);
  rows_.reserve(*device_memory_, memory.rows);
  blocks_.reserve(*device_memory_, memory.blocks);
}

void CudaBackend::prepare_experts(std::span<const ExpertView> experts) {
  if (experts.empty()) return;
  std::byte*& table = expert_tables_[experts.data()];
  std::size_t& count = expert_counts_[experts.data()];
  if (table != nullptr && count != experts.size()) {
    device_memory_->release(table, count * sizeof(ExpertView));
    table = nullptr;
  }
  if (table == nullptr) table = device_memory_->take(experts.size_bytes(), "the table of experts");
  count = experts.size();
  upload(experts.data(), table, experts.size_bytes());
}

bool CudaBackend::routed_experts(std::span<const ExpertView> experts, const Routing& routing,
                                 std::int64_t top_k, ConstMatrix x, Matrix hidden, Matrix routed,
                                 Matrix y, const ExpertView* shared) {
  if (!expert_tables_.contains(experts.data())) prepare_experts(experts);
  const auto count = static_cast<std::int64_t>(experts.size());
  std::byte* space =
      workspace(plugin_.experts_workspace(device_, experts.data(), count, x.rows, top_k));
  check(plugin_.routed_experts(
      device_, reinterpret_cast<const ExpertView*>(expert_tables_.at(experts.data())),
      experts.data(), count, on_device(routing), top_k, x, hidden, routed, y, shared, space));
  return true;
}

bool CudaBackend::takes_shared(std::span<const ExpertView> experts, const ExpertView& shared,
                               std::int64_t tokens, std::int64_t top_k) const {
  return !experts.empty() && plugin_.takes_shared(device_, experts.data(), &shared, tokens, top_k);
}

std::unique_ptr<Backend> make_cuda_backend(int index, std::uint64_t memory_limit) {
  return std::make_unique<CudaBackend>(cuda_plugin(), index, memory_limit);
}

}  // namespace dsfp4::ops
