#include "engine/options.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "base/cores.h"
#include "dsfp4/error.h"

namespace dsfp4::engine {
namespace {

constexpr int kMaxThreads = 1024;
constexpr double kGigabyte = 1e9;
constexpr double kMostGigabytes = 1e6;
constexpr std::int64_t kMostPrefetchLayers = 16;
constexpr std::int64_t kMostCount = std::numeric_limits<std::int32_t>::max();

void check_gigabytes(const std::optional<double>& value, const char* name) {
  if (!value || (*value >= 0.0 && *value <= kMostGigabytes)) return;  // NaN fails both
  throw ParameterError(name, "must be 0 to 1000000 GB, not " + std::to_string(*value));
}

void check_count(const std::optional<std::int64_t>& count, const char* name, const char* what) {
  if (!count || (*count >= 0 && *count <= kMostCount)) return;
  throw ParameterError(name, "must be 0 (none) to " + std::to_string(kMostCount) + " " + what +
                                 " in VRAM, not " + std::to_string(*count));
}

std::optional<std::uint64_t> bytes_of(const std::optional<double>& gigabytes) {
  if (!gigabytes) return std::nullopt;
  return static_cast<std::uint64_t>(std::llround(*gigabytes * kGigabyte));
}

}  // namespace

int thread_count(int threads) {
  if (threads < 0 || threads > kMaxThreads) {
    throw ParameterError("threads", "must be 0 (all cores) to " + std::to_string(kMaxThreads) +
                                        ", not " + std::to_string(threads));
  }
  return threads == 0 ? available_cores() : threads;
}

ops::KvFormat kv_format(const std::string& dtype, ops::KvFormat exact) {
  if (dtype == "bf16") return exact;
  if (dtype == "fp8") return ops::KvFormat::kFp8;
  throw ParameterError("kv_cache_dtype", "'" + dtype + "' is not one of bf16, fp8");
}

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
  if (config.cpu_share && !(*config.cpu_share >= 0.0 && *config.cpu_share <= 1.0)) {
    throw ParameterError("cpu_share", "must be 0 to 1, not " + std::to_string(*config.cpu_share));
  }
}

void check_memory_strategy(const MemoryStrategy& strategy) {
  check_gigabytes(strategy.cpu_cache_size, "cpu_cache_size");
  check_gigabytes(strategy.prefetch_size, "prefetch_size");
  check_gigabytes(strategy.gpu_reserved, "gpu_reserved");
  check_count(strategy.max_experts, "max_experts", "experts");
  check_count(strategy.max_gpu_layers, "max_gpu_layers", "layers");
  check_count(strategy.min_layers, "min_layers", "layers");
}

void check_memory_strategy(const MemoryStrategy& strategy, const std::string& device,
                           bool has_vram) {
  check_memory_strategy(strategy);
  const auto needs_vram = [&](bool given, const char* name) {
    if (!given || has_vram) return;
    throw ParameterError(name, "limits VRAM, and device '" + device + "' uses none");
  };
  needs_vram(strategy.max_experts.has_value(), "max_experts");
  needs_vram(strategy.gpu_reserved.has_value(), "gpu_reserved");
  needs_vram(strategy.max_gpu_layers.has_value(), "max_gpu_layers");
  needs_vram(strategy.min_layers.has_value(), "min_layers");
}

residency::Wishes wishes_of(const MemoryStrategy& strategy) {
  residency::Wishes wishes;
  wishes.cpu_cache_size = bytes_of(strategy.cpu_cache_size);
  wishes.prefetch_size = bytes_of(strategy.prefetch_size);
  wishes.max_experts = strategy.max_experts;
  wishes.max_gpu_layers = strategy.max_gpu_layers;
  wishes.min_layers = static_cast<std::uint64_t>(strategy.min_layers.value_or(0));
  wishes.gpu_reserved = bytes_of(strategy.gpu_reserved).value_or(0);
  return wishes;
}

residency::Wishes wishes_of(const LoadOptions& options, std::int64_t max_context, bool has_vram) {
  check_memory_config(options.memory);
  check_memory_strategy(options.strategy, options.device, has_vram);
  residency::Wishes wishes = wishes_of(options.strategy);
  wishes.max_context = max_context;
  wishes.prefetch_layers = std::max<std::int64_t>(1, options.memory.prefetch_layers.value_or(1));
  return wishes;
}

std::uint64_t shared_out(std::uint64_t available) noexcept {
  // A block takes whole pages of 2 MiB, and a model about twenty blocks, expert slots included.
  constexpr std::uint64_t kRounding = 24 * (std::uint64_t{2} << 20);
  return available - std::min(available, kRounding);
}

}  // namespace dsfp4::engine
