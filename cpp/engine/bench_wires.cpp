#include "engine/bench_wires.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "base/thread_pool.h"
#include "dsfp4/error.h"
#include "memory/arena.h"
#include "ops/measure/random_data.h"
#include "residency/device_experts.h"
#include "residency/plan.h"

namespace dsfp4::engine {
namespace {

constexpr std::int64_t kMostWidth = std::int64_t{1} << 16;
constexpr std::int64_t kMostExperts = 1024;  // of one go

void check(std::int64_t value, std::int64_t most, const char* parameter) {
  if (value >= 1 && value <= most) return;
  throw ParameterError(parameter,
                       "must be 1 to " + std::to_string(most) + ", not " + std::to_string(value));
}

void check_width(std::int64_t value, format::WeightFormat format, const char* parameter) {
  check(value, kMostWidth, parameter);
  const std::int64_t group = format == format::WeightFormat::kNvfp4   ? format::kNvfp4Group
                             : format == format::WeightFormat::kMxfp4 ? format::kMxfp4Group
                                                                      : 1;
  if (value % group == 0) return;
  throw ParameterError(parameter, "must be a multiple of " + std::to_string(group) + ", not " +
                                      std::to_string(value));
}

// Copies of one random expert, side by side in staging memory.
class StagedExperts {
 public:
  StagedExperts(memory::MemorySource& staging, const WireOptions& options)
      : made_(make(options)),
        count_(count(options)),
        memory_(count_ * padded_bytes(), "the benchmark's experts", staging) {
    experts_.reserve(count_);
    for (std::size_t i = 0; i < count_; ++i) {
      experts_.push_back(
          {{put(staging, made_[0]), put(staging, made_[1]), put(staging, made_[2])}, bytes()});
    }
  }

  std::span<const StagedExpert> all() const noexcept { return experts_; }

 private:
  /// Of one expert.
  std::uint64_t bytes() const noexcept {
    std::uint64_t bytes = 0;
    for (const format::EncodedMatrix& matrix : made_) {
      bytes += matrix.data.size() + matrix.scales.size();
    }
    return bytes;
  }
  using Expert = std::array<format::EncodedMatrix, 3>;  // gate, up, down

  static Expert make(const WireOptions& options) {
    ThreadPool pool(1);
    const auto matrix = [&](std::int64_t rows, std::int64_t cols, std::uint64_t seed) {
      return ops::measure::random_weight(pool, options.format, rows, cols, seed);
    };
    return {matrix(options.moe_intermediate_size, options.hidden_size, 1),
            matrix(options.moe_intermediate_size, options.hidden_size, 2),
            matrix(options.hidden_size, options.moe_intermediate_size, 3)};
  }
  // No expert is computed twice in one go, nor copied while it is still on its way.
  std::size_t count(const WireOptions& options) const {
    const std::uint64_t each = std::max<std::uint64_t>(1, bytes());
    const std::uint64_t enough = (options.bytes + each - 1) / each;
    return static_cast<std::size_t>(
        std::max(enough, static_cast<std::uint64_t>(2 * options.top_k)));
  }
  std::size_t padded_bytes() const {
    std::size_t bytes = 0;
    for (const format::EncodedMatrix& matrix : made_) {
      bytes += memory::Arena::padded(matrix.data.size());
      bytes += memory::Arena::padded(matrix.scales.size());
    }
    return bytes;
  }
  format::WeightView put(memory::MemorySource& staging, const format::EncodedMatrix& matrix) {
    const auto copy = [&](const std::vector<std::byte>& from) -> const std::byte* {
      if (from.empty()) return nullptr;
      std::byte* to = memory::on_host(staging, memory_.take(from.size()));
      std::memcpy(to, from.data(), from.size());
      return to;
    };
    format::WeightView view = matrix.view();
    view.data = copy(matrix.data);
    view.scales = copy(matrix.scales);
    return view;
  }

  const Expert made_;
  const std::size_t count_;
  memory::Arena memory_;
  std::vector<StagedExpert> experts_;
};

}  // namespace

WireRates measure_wires(ops::Ops& device, ops::Ops& host, const WireOptions& options) {
  check_width(options.hidden_size, options.format, "hidden_size");
  check_width(options.moe_intermediate_size, options.format, "moe_intermediate_size");
  check(options.top_k, kMostExperts, "top_k");
  constexpr double kMostSeconds = 600.0;
  if (!(options.seconds > 0.0 && options.seconds <= kMostSeconds)) {
    throw ParameterError("seconds", "must be over 0 and at most 600");
  }
  const StagedExperts experts(device.device().staging(), options);
  const WireShape shape{options.top_k, options.hidden_size, options.moe_intermediate_size};
  return wire_rates(device.device(), host, experts.all(),
                    residency::DeviceExperts::slot_bytes(experts.all().front().view),
                    residency::kDeviceRing, shape,
                    host_rate(host, experts.all(), shape, options.seconds), options.seconds);
}

}  // namespace dsfp4::engine
