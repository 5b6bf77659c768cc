// Operands of ops of the emulated device: what they keep of the host's, and where the device's lie.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "emulated/emulated_memory.h"
#include "ops/ops.h"
#include "ops/raw.h"

namespace dsfp4::ops::testing {

/// A batch with blocks of its own. Those of `rows` are empty.
struct KeptRows {
  SequenceRows rows;
  std::vector<DevicePtr<std::byte>> blocks;
};
using Batch = std::vector<KeptRows>;

Batch keep(std::span<const SequenceRows> batch);
/// True where both are the same rows at the same places; layers may differ.
bool same_places(const Batch& a, const Batch& b);

struct KeptTask {
  ExpertView expert;
  std::vector<std::int32_t> pairs;
};

std::vector<KeptTask> keep(std::span<const ExpertTask> tasks);

/// The inputs that a segment takes from the host.
struct HostInputs {
  std::vector<std::int32_t> ids;
  Batch batch;
};

/// Tokens of a cache that an op touches.
enum class Cached : std::uint8_t { kNew, kAll };

/// Translates the operands of one op as it runs. What it returns lives as long as it.
class Operands {
 public:
  /// `segment` is null outside of recordings.
  Operands(const EmulatedMemory::Access& memory, const HostInputs* segment)
      : memory_(memory), segment_(segment) {}

  template <typename T>
  MatrixOf<DevicePtr<T>> operator()(const MatrixOf<DevicePtr<T>>& x) const {
    const bool empty = x.rows <= 0 || x.cols <= 0;
    return {at(x.data, empty ? 0 : (x.rows - 1) * x.stride + x.cols), x.rows, x.cols, x.stride};
  }
  template <typename T>
  DeviceSpan<T> operator()(const DeviceSpan<T>& values) const {
    return {at(values.data, static_cast<std::int64_t>(values.size)), values.size};
  }
  WeightView operator()(const WeightView& weight) const;
  ExpertView operator()(const ExpertView& expert) const;
  Routing operator()(const Routing& routing) const;

  /// The segment's, in a recording.
  std::span<const std::int32_t> ids(const std::vector<std::int32_t>& kept) const;
  /// In a recording the rows and blocks are the segment's, the layer is that of `kept`.
  std::span<const SequenceRows> batch(const Batch& kept, std::int64_t width, Cached cached);
  std::span<const ExpertTask> tasks(std::span<const KeptTask> kept);
  /// Tasks for the chosen experts of a routing that is translated already.
  std::span<const ExpertTask> tasks(std::span<const ExpertView> experts, const Routing& routing);

 private:
  template <typename T>
  DevicePtr<T> at(DevicePtr<T> address, std::int64_t count) const {
    const auto bytes = static_cast<std::size_t>(count) * sizeof(T);
    return reinterpret_cast<T*>(memory_.bytes(unwrap(address), bytes));
  }

  const EmulatedMemory::Access& memory_;
  const HostInputs* segment_;
  Batch batch_;
  std::vector<SequenceRows> sequences_;
  std::vector<KeptTask> kept_tasks_;
  std::vector<ExpertTask> tasks_;
};

}  // namespace dsfp4::ops::testing
