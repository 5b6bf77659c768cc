// The rates of wire_rates() with random experts, for a benchmark.
#pragma once

#include <cstdint>

#include "engine/wires.h"
#include "ops/ops.h"

namespace dsfp4::engine {

struct WireOptions {
  /// Of an expert's three matrices.
  format::WeightFormat format = format::WeightFormat::kNvfp4;
  std::int64_t hidden_size = 0;
  std::int64_t moe_intermediate_size = 0;
  std::int64_t top_k = 0;  // experts that the processor computes in one go
  std::uint64_t bytes = std::uint64_t{1}
                        << 30;  // of experts in RAM, at least: more than caches hold
  double seconds = 1.0;         // for each of the three measurements; over 0
};

/// `device` is the GPU's, `host` the processor's. Takes memory for options.bytes of experts in the
/// device's staging memory and for a few experts on the device, and gives it back. Throws
/// ParameterError, MemoryLimitError, and what the device throws.
WireRates measure_wires(ops::Ops& device, ops::Ops& host, const WireOptions& options);

}  // namespace dsfp4::engine
