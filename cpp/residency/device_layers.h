// The dense weights of layers that VRAM does not hold: they lie in RAM as they would in VRAM, and
// are copied for every step, each layer while those before it are computed.
//
// A few buffers of the size of a layer go round. A layer always comes into the same one, so that
// its views never change and what was recorded of its ops stays good. The next layer's copy is
// spread over the layers before it, a piece at each, so that no expert waits long behind it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#include "base/counter.h"
#include "ops/device.h"
#include "residency/dense_layers.h"
#include "residency/device_trace.h"

namespace dsfp4::residency {

/// A layer's weights: in staging memory, and where they are used.
struct StagedLayer {
  std::int64_t layer = 0;  // the model's number
  const std::byte* from = nullptr;
  DevicePtr<std::byte> to;  // a buffer, of every `buffers`-th of these layers
  std::uint64_t bytes = 0;
};

struct DeviceLayerStats {
  Counter<std::uint64_t> copied_bytes;  // from RAM to VRAM
  /// In which ops waited for these copies, by the device's clock. Each wait is counted once another
  /// layer is entered after its end.
  Counter<double> wait_seconds;
};

/// Not safe to use from several threads at once, but for stats().
class DeviceLayers final : public DenseLayers {
 public:
  /// `layers`: ascending, more than `buffers`, which is at least 2; layers[i] goes to buffer
  /// i % buffers. The device, all memory and `trace`, which may be null, must outlive this, and the
  /// device's queues must be empty before the memory goes.
  DeviceLayers(std::vector<StagedLayer> layers, std::size_t buffers, ops::Device& device,
               DeviceTrace* trace = nullptr);

  /// Waits for nothing but a full queue: ops of the layer wait for the copy. Throws what the device
  /// throws.
  bool enter(std::int64_t layer) override;
  void leave(std::int64_t layer) noexcept override;

  /// Between steps only. False: a layer is copied when it is entered, and waited for.
  void overlap(bool on) noexcept { overlaps_ = on; }

  /// After an error: what was to be copied may not have been.
  void forget() noexcept;

  std::size_t layers() const noexcept { return layers_.size(); }
  const DeviceLayerStats& stats() const noexcept { return stats_; }

 private:
  struct Buffer {
    std::size_t holds = kNone;  // an index into layers_
    std::uint64_t queued = 0;   // bytes of it
    ops::Event copied;          // once all are
    ops::Event read;            // the ops before are done with it
  };
  // The ops' wait for a layer's copy.
  struct Wait {
    ops::Event begin, end;
  };
  static constexpr std::size_t kNone = static_cast<std::size_t>(-1);

  Buffer& buffer_of(std::size_t index) { return buffers_[index % buffers_.size()]; }
  void copy(std::size_t index, std::uint64_t bytes);
  void copy_ahead(std::int64_t layer);
  void wait_for_copy(std::size_t index);
  void count_waits();

  const std::vector<StagedLayer> layers_;
  ops::Device& device_;
  DeviceTrace* const trace_;
  std::vector<Buffer> buffers_;
  std::vector<Wait> waits_;            // by layer
  std::deque<std::size_t> under_way_;  // of those, the oldest first
  std::size_t entered_ = kNone;
  bool overlaps_ = true;
  DeviceLayerStats stats_;
};

}  // namespace dsfp4::residency
