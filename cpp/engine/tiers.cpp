#include "engine/tiers.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/log.h"
#include "dsfp4/error.h"
#include "memory/limits.h"

namespace dsfp4::engine {
namespace {

constexpr double kGigabyte = 1e9;
constexpr double kMostGigabytes = 1e6;
constexpr std::int64_t kMostPrefetchLayers = 16;

void check_gigabytes(const std::optional<double>& value, const char* name) {
  if (!value || (*value >= 0.0 && *value <= kMostGigabytes)) return;  // NaN fails both
  throw ParameterError(name, "must be 0 to 1000000 GB, not " + std::to_string(*value));
}

std::optional<std::uint64_t> bytes_of(const std::optional<double>& gigabytes) {
  if (!gigabytes) return std::nullopt;
  return static_cast<std::uint64_t>(std::llround(*gigabytes * kGigabyte));
}

residency::RamWishes wishes_of(const MemoryStrategy& strategy) {
  return {bytes_of(strategy.cpu_cache_size), bytes_of(strategy.prefetch_size)};
}

// The layer that is computed, and those that are read ahead of it.
std::size_t layer_buffers(const MemoryConfig& config) {
  return static_cast<std::size_t>(1 +
                                  std::max<std::int64_t>(1, config.prefetch_layers.value_or(1)));
}

// Which bytes of which tensors a matrix is, for WeightCheck.
void add_tensors(const checkpoint::WeightSource& source, const format::WeightView& view,
                 std::vector<ReadTensor>& tensors) {
  tensors.push_back({source.data, view.data, nullptr});
  if (source.scales != nullptr) tensors.push_back({source.scales, view.scales, &view});
}

void count_reads(const storage::ReaderStats& reader, ModelStats& stats) {
  stats.reads = reader.reads;
  stats.read_bytes = reader.bytes_read;
  stats.read_retries = reader.retries;
  stats.read_stalls = reader.stalls;
  stats.reads_in_flight = reader.in_flight;
  stats.ssd_busy_seconds = reader.busy_seconds;
}

}  // namespace

void check_memory_config(const MemoryConfig& config) {
  const std::int64_t ahead = config.prefetch_layers.value_or(0);
  if (ahead < 0 || ahead > kMostPrefetchLayers) {
    throw ParameterError("prefetch_layers", "must be 0 (off) to " +
                                                std::to_string(kMostPrefetchLayers) + ", not " +
                                                std::to_string(ahead));
  }
  if (!(config.expert_threshold >= 0.0 && config.expert_threshold <= 1.0)) {
    throw ParameterError("expert_threshold",
                         "must be 0 (exact) to 1, not " + std::to_string(config.expert_threshold));
  }
}

void check_memory_strategy(const MemoryStrategy& strategy) {
  check_gigabytes(strategy.cpu_cache_size, "cpu_cache_size");
  check_gigabytes(strategy.prefetch_size, "prefetch_size");
}

residency::RamPlan plan_tiers(const checkpoint::ModelConfig& config, const LoadOptions& options,
                              const WeightSizes& sizes, std::uint64_t others,
                              const memory::MachineMemory& machine) {
  check_memory_config(options.memory);
  check_memory_strategy(options.strategy);
  residency::RamNeeds needs;
  needs.others = sizes.dense_bytes + others + machine.process + memory::kUncountedBytes;
  needs.expert_bytes = sizes.expert_bytes;
  needs.slot_bytes = sizes.slot_bytes;
  needs.experts = sizes.experts;
  needs.experts_per_token = static_cast<std::uint64_t>(config.num_experts_per_tok);
  needs.layer_bytes = sizes.layer_bytes;
  needs.layer_buffer_bytes = layer_buffers(options.memory) * sizes.layer_slot_bytes;
  return residency::plan_ram(needs, wishes_of(options.strategy), ram_ceiling(options, machine));
}

std::uint64_t ram_ceiling(const LoadOptions& options, const memory::MachineMemory& machine) {
  const std::uint64_t limit =
      options.ram_limit > 0 ? options.ram_limit : memory::default_ram_limit(machine);
  if (machine.available >= limit) return limit;  // also where it is not known
  return std::min(limit, machine.process + machine.available);
}

storage::ReaderOptions reader_options(const LoadOptions& options) {
  storage::ReaderOptions reading;
  if (options.reader == "io_uring") {
    reading.kind = storage::ReaderKind::kUring;
  } else if (options.reader == "pread") {
    reading.kind = storage::ReaderKind::kPread;
  } else if (options.reader != "auto") {
    throw ParameterError("reader", "'" + options.reader + "' is not one of auto, io_uring, pread");
  }
  reading.direct = options.direct_reads;
  reading.log = [](std::string_view message) { log(LogLevel::kWarning, message); };
  return reading;
}

Tiers::Tiers(ops::Backend& backend, const model::ModelSpec& spec, LoadedWeights& loaded,
             const residency::RamPlan& plan, std::uint64_t reserved, std::uint64_t ceiling,
             const LoadOptions& options, Trace* trace)
    : loaded_(loaded),
      plan_(plan),
      fingerprint_(loaded.fingerprint),
      experts_per_token_(static_cast<std::size_t>(spec.router.top_k)),
      policy_(options.cache_policy),
      ceiling_(ceiling),
      reserved_(reserved) {
  if (!loaded.streamed.empty()) {
    stream_ = std::make_unique<residency::LayerStream>(
        std::move(loaded.streamed), layer_buffers(options.memory), *loaded.reader,
        [check = loaded.check.get()](const residency::StreamedLayer& layer) {
          std::vector<ReadTensor> tensors;
          for (const auto& matrix : layer.matrices) {
            add_tensors(*matrix.source, *matrix.view, tensors);
          }
          check->check(tensors);
        },
        trace);
  }
  if (plan.tiered) {
    make_store(backend, spec, trace);
    configure(options.memory);
    warm_start(options.warm_start_folder);
    return;
  }
  runner_ = std::make_unique<residency::ResidentExperts>(
      backend, spec.hidden_size, spec.moe_intermediate_size,
      [&loaded](std::int64_t layer) -> std::span<const ops::ExpertView> {
        return loaded.weights.layers[static_cast<std::size_t>(layer)].experts;
      });
}

void Tiers::make_store(ops::Backend& backend, const model::ModelSpec& spec, Trace* trace) {
  residency::ExpertStore::Options store;
  store.layers = spec.moe_layers();
  store.first_layer = spec.dense_layers;
  store.experts = spec.router.experts;
  store.slots = plan_.slots;
  store.cache_slots = plan_.cache_slots;
  store.trace = trace;
  store.check = [this, first = spec.dense_layers, experts = spec.router.experts](
                    std::span<const residency::ExpertKey> keys,
                    std::span<const ops::ExpertView> views) {
    std::vector<ReadTensor> tensors;
    for (std::size_t i = 0; i < keys.size(); ++i) {
      const auto key = static_cast<std::int64_t>(keys[i]);
      const checkpoint::MlpSource& source =
          loaded_.layout.layers[static_cast<std::size_t>(first + key / experts)]
              .experts[static_cast<std::size_t>(key % experts)];
      add_tensors(source.gate_proj, views[i].gate_proj, tensors);
      add_tensors(source.up_proj, views[i].up_proj, tensors);
      add_tensors(source.down_proj, views[i].down_proj, tensors);
    }
    loaded_.check->check(tensors);
  };
  store_ = std::make_unique<residency::ExpertStore>(
      std::move(store), std::move(loaded_.images), *loaded_.reader,
      residency::make_policy(policy_, spec.moe_layers(), spec.router.experts));
  slot_bytes_ = store_->slot_size();
  std::vector<residency::RouterView> routers;
  for (std::int64_t layer = spec.dense_layers; layer < spec.layers; ++layer) {
    const model::LayerWeights& weights = loaded_.weights.layers[static_cast<std::size_t>(layer)];
    routers.push_back({weights.gate, weights.e_score_correction_bias});
  }
  auto tiered = std::make_unique<residency::TieredExperts>(
      backend, *store_, spec.router, std::move(routers), spec.dense_layers, spec.hidden_size,
      spec.moe_intermediate_size, trace);
  tiered_ = tiered.get();
  runner_ = std::move(tiered);
}

void Tiers::warm_start(const std::string& folder) {
  if (folder.empty()) return;
  warm_start_ = std::make_unique<residency::WarmStart>(folder, fingerprint_, policy_);
  const auto state = warm_start_->load();
  if (state && store_->restore_policy(*state)) store_->warm_up();
}

Tiers::~Tiers() { save_warm_start(true); }

void Tiers::remember() noexcept { save_warm_start(false); }

void Tiers::save_warm_start(bool last) noexcept {
  if (warm_start_ == nullptr) return;
  try {
    if (last) {
      warm_start_->save_last(store_->policy_state());
    } else {
      warm_start_->save(store_->policy_state(), residency::WarmStart::Clock::now());
    }
  } catch (const std::exception& error) {  // a convenience: not worth an answer that is ready
    log(LogLevel::kWarning, std::string("the use of experts is not remembered: ") + error.what());
  }
}

void Tiers::configure(const MemoryConfig& config) {
  check_memory_config(config);
  if (tiered_ != nullptr) {
    tiered_->configure({config.prefetch_layers, static_cast<float>(config.expert_threshold)});
  }
}

void Tiers::place(const MemoryStrategy& strategy, const Poll& poll) {
  check_memory_strategy(strategy);
  if (!tiered()) {
    if (!strategy.cpu_cache_size && !strategy.prefetch_size) return;
    throw ParameterError("cpu_cache_size",
                         "the whole model was loaded into memory; give cpu_cache_size when the "
                         "model is loaded, then it can be changed");
  }
  residency::RamNeeds needs;
  needs.others = plan_.total_bytes - plan_.expert_bytes;
  needs.slot_bytes = slot_bytes_;
  needs.experts = loaded_.experts;
  needs.expert_bytes = std::numeric_limits<std::uint64_t>::max() / 2;  // stays in the files
  needs.experts_per_token = experts_per_token_;
  const residency::RamPlan plan = residency::plan_ram(needs, wishes_of(strategy), ceiling_);
  store_->resize(plan.slots, plan.cache_slots, poll);
  const std::lock_guard lock(plan_mutex_);
  plan_ = plan;
}

ModelStats Tiers::stats() const {
  ModelStats stats;
  {
    const std::lock_guard lock(plan_mutex_);
    stats.reserved_bytes = reserved_ + plan_.expert_bytes;
    stats.cache_slots = plan_.cache_slots;
    stats.slots = plan_.slots;
  }
  stats.tiered = tiered();
  if (stream_ != nullptr) {
    stats.streamed_layers = stream_->layers();
    stats.streamed_bytes = stream_->stats().bytes;
    stats.stream_wait_seconds = stream_->stats().wait_seconds;
  }
  if (loaded_.reader != nullptr) count_reads(loaded_.reader->stats(), stats);
  if (!tiered()) return stats;
  const residency::StoreStats store = store_->stats();
  const residency::TieredStats& runner = tiered_->stats();
  stats.slot_bytes = slot_bytes_;
  stats.hits = store.hits;
  stats.misses = store.misses;
  stats.joined = store.joined;
  stats.prefetched = store.prefetched;
  stats.evictions = store.evictions;
  stats.prefetched_bytes = store.prefetched_bytes;
  stats.demand_bytes = store.demand_bytes;
  stats.speculative_bytes = store.speculative_bytes;
  stats.wasted_bytes = store.wasted_bytes;
  stats.used_bytes = runner.used_bytes;
  stats.skipped_pairs = runner.skipped_pairs;
  stats.total_pairs = runner.total_pairs;
  const residency::PrefetchStats& prefetch = tiered_->prefetch_stats();
  stats.predicted = prefetch.predicted;
  stats.predicted_used = prefetch.predicted_used;
  stats.predictable = prefetch.chosen;
  stats.image_bytes = store_->image_bytes(0);
  stats.wait_seconds = runner.wait_seconds;
  stats.expert_seconds = runner.compute_seconds;
  return stats;
}

}  // namespace dsfp4::engine
