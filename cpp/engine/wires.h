// The rates of the two wires that experts in RAM cross beside a GPU: alone, and both at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/poll.h"
#include "ops/ops.h"

namespace dsfp4::engine {

/// Experts that are taken in turn; together more than caches hold.
struct StagedExpert {
  ops::HostExpertView view;  // in the staging memory of the GPU, or of the processor without one
  std::uint64_t bytes = 0;   // of its matrices
};

struct WireShape {
  std::int64_t top_k = 0;  // experts that the processor computes in one go
  std::int64_t hidden_size = 0;
  std::int64_t moe_intermediate_size = 0;
};

/// Bytes of experts per second.
struct WireRates {
  double copies = 0.0;  // from staging memory to the device, as DeviceExperts copies them
  double host = 0.0;    // the processor computes one token with them, in staging memory
  // Both at once:
  double copies_beside = 0.0;
  double host_beside = 0.0;

  double together() const noexcept { return copies_beside + host_beside; }
};

/// Of the processor alone. There are at least 2 * shape.top_k experts, as in all that follows;
/// `seconds` over 0. Throws MemoryLimitError and what `poll` throws.
double host_rate(ops::Ops& host, std::span<const StagedExpert> experts, const WireShape& shape,
                 double seconds, const Poll& poll = {});

/// `host_alone`: as host_rate() says. Takes memory for `slots` experts of `slot_bytes` bytes on the
/// device, and gives it back. `seconds`: for each of two measurements. Throws MemoryLimitError,
/// CudaError and what `poll` throws.
WireRates wire_rates(ops::Device& device, ops::Ops& host, std::span<const StagedExpert> experts,
                     std::size_t slot_bytes, std::size_t slots, const WireShape& shape,
                     double host_alone, double seconds, const Poll& poll = {});

}  // namespace dsfp4::engine
