#include "residency/floor.h"

#include <algorithm>
#include <cstddef>

namespace dsfp4::residency {
namespace {

std::uint64_t streamed_bytes(const Plan& plan, const ModelBytes& model) {
  std::uint64_t bytes = 0;
  for (std::size_t layer = 0; layer < plan.streamed.size(); ++layer) {
    if (plan.streamed[layer]) bytes += model.layers[layer];
  }
  return bytes;
}

// Nothing takes no time, whatever the rate.
std::optional<double> seconds_of(double bytes, double rate) {
  if (bytes <= 0.0) return 0.0;
  if (rate <= 0.0) return std::nullopt;
  return bytes / rate;
}

}  // namespace

std::optional<double> least_decode_seconds(const Plan& plan, const ModelBytes& model,
                                           std::uint64_t routed_bytes, const HitRates& hits,
                                           const Rates& rates) {
  const auto routed = static_cast<double>(routed_bytes);
  const bool on_gpu = plan.device_slots > 0;
  // An expert of RAM goes over one of two wires.
  const bool know_both = rates.both_host_experts > 0.0 && rates.both_copy_in > 0.0;
  const double both = know_both ? rates.both_host_experts + rates.both_copy_in : 0.0;
  const auto ram = seconds_of(routed * (1.0 - hits.vram), on_gpu ? both : rates.host_experts);
  const double missing = plan.tiered ? routed * (1.0 - hits.vram - hits.ram) : 0.0;
  const auto ssd =
      seconds_of(missing + static_cast<double>(streamed_bytes(plan, model)), rates.ssd);
  if (!ram || !ssd) return std::nullopt;
  return std::max(*ram, *ssd);
}

}  // namespace dsfp4::residency
