#include "residency/device_layers.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <utility>

#include "base/checked.h"
#include "base/log.h"

namespace dsfp4::residency {

DeviceLayers::DeviceLayers(std::vector<StagedLayer> layers, std::size_t buffers,
                           ops::Device& device, DeviceTrace* trace)
    : layers_(std::move(layers)),
      device_(device),
      trace_(trace),
      buffers_(buffers),
      waits_(layers_.size()) {
  for (Buffer& buffer : buffers_) {
    buffer.copied = device_.make_event();
    buffer.read = device_.make_event();
  }
  for (Wait& wait : waits_) {
    wait.begin = device_.make_timed_event();
    wait.end = device_.make_timed_event();
  }
}

// Queues so many more bytes of a layer's copy, or what is left of it.
void DeviceLayers::copy(std::size_t index, std::uint64_t bytes) {
  const StagedLayer& layer = layers_[index];
  Buffer& buffer = buffer_of(index);
  if (buffer.holds != index) {
    device_.wait(ops::Queue::kUpload, buffer.read);
    buffer.holds = index;
    buffer.queued = 0;
  }
  bytes = std::min(bytes, layer.bytes - buffer.queued);
  if (bytes == 0) return;
  const auto at = static_cast<std::ptrdiff_t>(buffer.queued);
  if (trace_ != nullptr) trace_->begin_copy();
  device_.copy_in(ops::Queue::kUpload, layer.from + at, layer.to + at, bytes);
  if (trace_ != nullptr) {
    trace_->end_copy("layer " + std::to_string(layer.layer) + " dense weights", bytes);
  }
  buffer.queued += bytes;
  stats_.copied_bytes += bytes;
  if (buffer.queued == layer.bytes) device_.record(ops::Queue::kUpload, buffer.copied);
}

bool DeviceLayers::enter(std::int64_t layer) {
  const auto found = std::ranges::find(layers_, layer, &StagedLayer::layer);
  // Another step's, which has not done with it: its ops so far come before the next copy.
  if (entered_ != kNone && layers_[entered_].layer != layer) leave(layers_[entered_].layer);
  try {
    count_waits();
    if (found != layers_.end()) {
      const auto index = static_cast<std::size_t>(found - layers_.begin());
      copy(index, found->bytes);
      wait_for_copy(index);
      entered_ = index;
      if (!overlaps_) device_.wait_for(buffer_of(index).copied);
    }
    if (overlaps_) copy_ahead(layer);
  } catch (...) {
    forget();
    throw;
  }
  return true;
}

// Holds up the ops that follow. The wait is timed, unless the layer's last one has not ended.
void DeviceLayers::wait_for_copy(std::size_t index) {
  const Wait& wait = waits_[index];
  const bool timed = std::ranges::find(under_way_, index) == under_way_.end();
  if (timed) device_.record(ops::Queue::kCompute, wait.begin);
  device_.wait(ops::Queue::kCompute, buffer_of(index).copied);
  if (!timed) return;
  device_.record(ops::Queue::kCompute, wait.end);
  under_way_.push_back(index);
}

void DeviceLayers::count_waits() {
  while (!under_way_.empty()) {
    const Wait& wait = waits_[under_way_.front()];
    if (!device_.passed(wait.end)) return;
    const std::chrono::duration<double> time =
        device_.time_of(wait.end) - device_.time_of(wait.begin);
    stats_.wait_seconds += std::max(time.count(), 0.0);  // the clocks are compared anew at times
    under_way_.pop_front();
  }
}

// A piece of the next layers' copies: the nearest one's share of the layers before it, then those
// behind it, which have their own buffers.
void DeviceLayers::copy_ahead(std::int64_t layer) {
  const auto after = std::ranges::upper_bound(layers_, layer, {}, &StagedLayer::layer);
  const auto first = static_cast<std::size_t>(after - layers_.begin());
  for (std::size_t i = 0; i + 1 < buffers_.size(); ++i) {
    const std::size_t index = (first + i) % layers_.size();
    const Buffer& buffer = buffer_of(index);
    const auto has = [&](std::size_t other) { return &buffer == &buffer_of(other); };
    if (entered_ != kNone && has(entered_)) return;
    for (std::size_t nearer = 0; nearer < i; ++nearer) {
      if (has((first + nearer) % layers_.size())) return;
    }
    const std::uint64_t left = layers_[index].bytes - (buffer.holds == index ? buffer.queued : 0);
    if (left == 0) continue;
    // After the last layer comes the next step's first.
    const std::int64_t before = std::max<std::int64_t>(1, layers_[index].layer - layer);
    copy(index, ceil_div(left, static_cast<std::uint64_t>(before)));
    return;
  }
}

void DeviceLayers::leave(std::int64_t layer) noexcept {
  if (entered_ == kNone || layers_[entered_].layer != layer) return;
  Buffer& buffer = buffer_of(entered_);
  entered_ = kNone;
  try {
    device_.record(ops::Queue::kCompute, buffer.read);
  } catch (const std::exception& error) {  // the next call of the device throws it again
    log(LogLevel::kInfo, error.what());
  }
}

void DeviceLayers::forget() noexcept {
  if (entered_ != kNone) leave(layers_[entered_].layer);  // ops may still read it
  for (Buffer& buffer : buffers_) buffer.holds = kNone;
}

}  // namespace dsfp4::residency
