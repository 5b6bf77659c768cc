// Measures the machine's wires with a model's own experts, before its tiers take their memory.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/poll.h"
#include "dsfp4/rates.h"
#include "ops/ops.h"
#include "residency/file_image.h"
#include "storage/reader.h"

namespace dsfp4::engine {

/// How much is moved. Tests have less.
struct RateLimits {
  std::chrono::milliseconds ssd_time{1000};
  std::chrono::milliseconds time{500};  // for each other wire
  /// Experts that the processor computes with in turn: fewer bytes than the least might stay in its
  /// caches, and are not measured.
  std::uint64_t least_bytes = std::uint64_t{256} << 20;
  std::uint64_t most_bytes = std::uint64_t{512} << 20;
  /// Of reads in flight: twice what a reader has with the system.
  std::uint64_t in_flight_bytes = std::uint64_t{64} << 20;
};

/// The ends of the wires, and the room that the plan has for experts on either side.
struct Wires {
  ops::Ops& host;              // the processor's
  ops::Device* gpu = nullptr;  // null: there is none
  storage::Reader& reader;
  std::span<const residency::ExpertImage> images;
  std::size_t slots = 0;  // in RAM
  std::uint64_t slot_bytes = 0;
  std::size_t device_slots = 0;  // in VRAM, at least 1 beside a GPU
  std::uint64_t device_slot_bytes = 0;
  std::int64_t top_k = 0;
  std::int64_t hidden_size = 0;
  std::int64_t moe_intermediate_size = 0;
};

/// True where there is enough to measure with.
bool are_measurable(const Wires& wires, const RateLimits& limits);

/// Fills in `rates` within some seconds; wires must be measurable. Of a disk that takes longer for
/// a few experts only the rate of reads becomes known. Takes no more memory than the slots of the
/// plan, and gives it back. Throws IoError, CudaError, MemoryLimitError and what `poll` throws;
/// then some rates are left as they were.
void measure_rates(const Wires& wires, const RateLimits& limits, const Poll& poll, Rates& rates);

}  // namespace dsfp4::engine
