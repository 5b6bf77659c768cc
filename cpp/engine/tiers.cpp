#include "engine/tiers.h"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/log.h"
#include "dsfp4/error.h"
#include "engine/options.h"

namespace dsfp4::engine {
namespace {

void count_reads(const storage::ReaderStats& reader, ModelStats& stats) {
  stats.reads = reader.reads;
  stats.read_bytes = reader.bytes_read;
  stats.read_retries = reader.retries;
  stats.read_stalls = reader.stalls;
  stats.reads_in_flight = reader.in_flight;
  stats.ssd_busy_seconds = reader.busy_seconds;
}

}  // namespace

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
  if (options.ssd_rate != 0 &&
      (options.ssd_rate < storage::kSlowestRate || options.ssd_rate > storage::kFastestRate)) {
    throw ParameterError("ssd_rate",
                         "must be 0.001 to 1000 GB/s, not " +
                             std::to_string(static_cast<double>(options.ssd_rate) * 1e-9));
  }
  reading.bytes_per_second = options.ssd_rate;
  reading.log = [](std::string_view message) { log(LogLevel::kWarning, message); };
  return reading;
}

Tiers::Tiers(ops::Ops& ops, ops::Ops* host, const model::ModelSpec& spec, LoadedWeights& loaded,
             Planned& planned, const Rates& rates, const LoadOptions& options, const Traces& traces)
    : device_(ops.device()),
      loaded_(loaded),
      planned_(planned),
      rates_(rates),
      fingerprint_(loaded.fingerprint),
      policy_(options.cache_policy),
      max_gpu_layers_(options.strategy.max_gpu_layers),
      min_layers_(options.strategy.min_layers) {
  const residency::Plan plan = planned_.plan();
  if (!loaded.streamed.empty()) {
    stream_ = std::make_unique<residency::LayerStream>(
        std::move(loaded.streamed), plan.layer_buffers, *loaded.reader,
        [check = loaded.check.get()](const residency::StreamedLayer& layer,
                                     const std::byte* buffer) {
          std::vector<ReadTensor> tensors;
          for (const residency::FileMatrix& matrix : layer.from.matrices) {
            add_tensors(*matrix.source, matrix.place.in(buffer, *matrix.view), false, tensors);
          }
          check->check(tensors);
        },
        traces.host);
  }
  if (!loaded.staged.empty()) {
    device_layers_ = std::make_unique<residency::DeviceLayers>(
        std::move(loaded.staged), plan.layer_buffers, device_, traces.device);
  }
  if (plan.tiered) {
    make_store(ops, host, spec, plan, traces);
    configure(options.memory);
    warm_start(options.warm_start_folder);
    return;
  }
  runner_ = std::make_unique<residency::ResidentExperts>(
      ops, spec.hidden_size, spec.moe_intermediate_size,
      [&loaded](std::int64_t layer) -> std::span<const ops::ExpertView> {
        return loaded.weights.layers[static_cast<std::size_t>(layer)].experts;
      });
}

void Tiers::make_store(ops::Ops& ops, ops::Ops* host, const model::ModelSpec& spec,
                       const residency::Plan& plan, const Traces& traces) {
  residency::ExpertStore::Options store;
  store.layers = spec.moe_layers();
  store.first_layer = spec.dense_layers;
  store.experts = spec.router.experts;
  store.slots = plan.slots;
  store.cache_slots = plan.cache_slots;
  store.trace = traces.host;
  store.memory = &ops.device().staging();
  store.check = [this, first = spec.dense_layers, experts = spec.router.experts](
                    std::span<const residency::ExpertKey> keys,
                    std::span<const ops::HostExpertView> views) {
    std::vector<ReadTensor> tensors;
    for (std::size_t i = 0; i < keys.size(); ++i) {
      const auto key = static_cast<std::int64_t>(keys[i]);
      const checkpoint::MlpSource& source =
          loaded_.layout->layers[static_cast<std::size_t>(first + key / experts)]
              .experts[static_cast<std::size_t>(key % experts)];
      add_tensors(source.gate_proj, views[i].gate_proj, false, tensors);
      add_tensors(source.up_proj, views[i].up_proj, false, tensors);
      add_tensors(source.down_proj, views[i].down_proj, false, tensors);
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
    const DeviceSpan<const float> bias = weights.e_score_correction_bias;
    std::vector<float> bias_on_host(bias.size);
    ops.device().download(bias.data, bias_on_host.data(), bias.size_bytes());
    routers.push_back({weights.gate, bias, std::move(bias_on_host)});
  }
  if (host != nullptr) {
    device_slot_bytes_ = loaded_.sizes.device_slot_bytes;
    device_experts_ = std::make_unique<residency::DeviceExperts>(
        ops.device(), device_slot_bytes_, plan.device_slots, plan.device_cache_slots,
        static_cast<std::uint64_t>(spec.moe_layers() * spec.router.experts),
        [this](std::span<const residency::ExpertKey> keys, std::span<float> worth) {
          store_->worth(keys, worth);
        },
        traces.device);
    device_tier_ = std::make_unique<residency::DeviceTier>(
        ops, *host, *device_experts_, *store_,
        residency::DeviceTier::Shape{spec.router.top_k, spec.hidden_size,
                                     spec.moe_intermediate_size},
        traces.device);
    device_tier_->start_rates(rates_.both_copy_in, rates_.both_host_experts);
  }
  auto tiered = std::make_unique<residency::TieredExperts>(
      ops, *store_, spec.router, std::move(routers), spec.dense_layers, spec.hidden_size,
      spec.moe_intermediate_size, plan.chunk, device_tier_.get(), traces.host);
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

residency::DenseLayers* Tiers::layers() noexcept {
  if (device_layers_ != nullptr) return device_layers_.get();
  return stream_.get();
}

void Tiers::after_error() noexcept {
  runner_->after_error();
  if (device_layers_ != nullptr) device_layers_->forget();
}

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
    tiered_->configure(
        {config.prefetch_layers, static_cast<float>(config.expert_threshold), config.cpu_share});
  }
}

void Tiers::overlap(const ComputeStreams& streams) noexcept {
  if (stream_ != nullptr) stream_->read_ahead(streams.prefetch);
  if (device_layers_ != nullptr) device_layers_->overlap(streams.transfer);
  if (device_tier_ != nullptr) device_tier_->overlap(streams.compute, streams.transfer);
  if (tiered_ != nullptr) tiered_->overlap(streams.prefetch);
}

void Tiers::place(const MemoryStrategy& strategy, const Poll& poll) {
  planned_.check(strategy);
  const auto stays = [](const auto& now, const auto& at_load, const char* name) {
    if (!now || now == at_load) return;
    throw ParameterError(name, "is taken when the model is loaded, and stays as it is");
  };
  stays(strategy.max_gpu_layers, max_gpu_layers_, "max_gpu_layers");
  stays(strategy.min_layers, min_layers_, "min_layers");
  if (!tiered()) {
    const bool of_vram = strategy.max_experts || strategy.gpu_reserved;
    if (!of_vram && !strategy.cpu_cache_size && !strategy.prefetch_size) return;
    const std::string name = of_vram ? "max_experts" : "cpu_cache_size";
    throw ParameterError(name, "the whole model was loaded into memory; give " + name +
                                   " when the model is loaded, then it can be changed");
  }
  if (device_tier_ != nullptr) device_tier_->settle();
  std::uint64_t vram = 0;  // that the whole model could have now
  if (device_experts_ != nullptr) vram = device_.memory().available() + planned_.plan().vram_bytes;
  const auto apply = [&](const residency::Plan& next) {
    if (device_experts_ == nullptr) {
      store_->resize(next.slots, next.cache_slots, poll);
    } else {
      resize_both(next, poll);
    }
  };
  planned_.change(strategy, apply, vram);
}

// Slots in RAM and VRAM, or neither: the first is taken back, without asking, if the second fails.
void Tiers::resize_both(const residency::Plan& next, const Poll& poll) {
  struct Counts {
    std::size_t slots, cache_slots;
    bool operator==(const Counts&) const = default;
  };
  const auto in_ram = [&](const Counts& to, const Poll& asking) {
    store_->resize(to.slots, to.cache_slots, asking);
  };
  const auto in_vram = [&](const Counts& to, const Poll& asking) {
    if (to == Counts{device_experts_->slots(), device_experts_->cache_slots()}) return;
    device_tier_->resize(to.slots, to.cache_slots, asking);
  };
  const auto in_turn = [&](const auto& first, const Counts& then, const Counts& before,
                           const auto& second, const Counts& to) {
    first(then, poll);
    try {
      second(to, poll);
    } catch (...) {
      first(before, Poll());
      throw;
    }
  };
  const Counts ram{next.slots, next.cache_slots};
  const Counts vram{next.device_slots, next.device_cache_slots};
  const Counts ram_before{store_->options().slots, store_->options().cache_slots};
  const Counts vram_before{device_experts_->slots(), device_experts_->cache_slots()};
  if (vram.slots < vram_before.slots) {  // what has to go finds its place in RAM as it will be
    in_turn(in_ram, ram, ram_before, in_vram, vram);
  } else {
    in_turn(in_vram, vram, vram_before, in_ram, ram);
  }
}

ModelStats Tiers::stats() const {
  ModelStats stats;
  const residency::Plan plan = planned_.plan();
  stats.reserved_bytes = plan.ram_bytes + plan.vram_bytes;
  stats.cache_slots = plan.cache_slots;
  stats.slots = plan.slots;
  stats.tiered = tiered();
  stats.rates = rates_;
  if (stream_ != nullptr) {
    stats.streamed_layers = stream_->layers();
    stats.streamed_bytes = stream_->stats().bytes;
    stats.stream_wait_seconds = stream_->stats().wait_seconds;
  }
  if (device_layers_ != nullptr) {
    stats.streamed_layers = device_layers_->layers();
    stats.layer_upload_bytes = device_layers_->stats().copied_bytes;
    stats.layer_upload_wait_seconds = device_layers_->stats().wait_seconds;
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
  if (device_tier_ == nullptr) return stats;
  const residency::DeviceStats& device = device_experts_->stats();
  stats.device_slots = plan.device_slots;
  stats.device_cache_slots = plan.device_cache_slots;
  stats.device_slot_bytes = device_slot_bytes_;
  stats.device_hits = device.hits;
  stats.uploads = device.brought;
  stats.uploaded_bytes = device.brought_bytes;
  stats.device_evictions = device.evictions;
  stats.device_returns = device.sent_back;
  stats.uploads_ahead = device_tier_->stats().copied_ahead;
  stats.uploads_ahead_used = device.passing;
  stats.cpu_bytes = device_tier_->stats().host_bytes;
  stats.cpu_seconds = device_tier_->stats().host_seconds;
  return stats;
}

}  // namespace dsfp4::engine
