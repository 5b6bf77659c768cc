#include "ops/host_routing.h"

#include <exception>

#include "base/log.h"
#include "ops/scratch.h"

namespace dsfp4::ops {
namespace {

using memory::Arena;

// The places of a routing's parts in its piece of memory.
struct Layout {
  Layout(std::int64_t tokens, const RouterSpec& spec)
      : pairs(static_cast<std::size_t>(tokens * spec.top_k)),
        logits(static_cast<std::size_t>(tokens * spec.experts)),
        choice_bytes(Arena::padded(pairs * sizeof(float))),
        bytes(3 * choice_bytes + Arena::padded(logits * sizeof(float))) {}

  std::size_t pairs, logits;  // values
  std::size_t choice_bytes;   // of the choice, of what is used, and of the weights
  std::size_t bytes;
};

// From the first byte of a routing of take_routing() to the last.
std::size_t bytes_of(const Routing& routing) {
  const auto values = static_cast<std::size_t>(routing.logits.rows * routing.logits.cols);
  return static_cast<std::size_t>(routing.logits.data.as<const std::byte>() -
                                  routing.experts.data.as<const std::byte>()) +
         values * sizeof(float);
}

}  // namespace

Routing take_routing(Arena& arena, std::int64_t tokens, const RouterSpec& spec) {
  const Layout layout(tokens, spec);
  const DevicePtr<std::byte> at = arena.take(layout.bytes);
  const auto part = [&](std::size_t n) {
    return at + static_cast<std::ptrdiff_t>(n * layout.choice_bytes);
  };
  return {{part(0).as<std::int32_t>(), layout.pairs},
          {part(1).as<std::int32_t>(), layout.pairs},
          {part(2).as<float>(), layout.pairs},
          {part(3).as<float>(), tokens, spec.experts, spec.experts}};
}

std::size_t routing_bytes(std::int64_t tokens, const RouterSpec& spec) {
  return Layout(tokens, spec).bytes;
}

RoutingReader::RoutingReader(Device& device, std::int64_t tokens, const RouterSpec& spec,
                             std::int64_t hidden_size)
    : device_(device),
      staging_(staging_bytes(device.host_visible(), tokens, spec, hidden_size),
               "the routing on its way", device.staging()),
      event_(device.make_event()) {}

RoutingReader::~RoutingReader() {
  try {
    device_.wait_for(event_);
  } catch (const std::exception& error) {  // a device that has failed copies nothing any more
    log(LogLevel::kInfo, error.what());
  }
}

std::size_t RoutingReader::staging_bytes(bool host_visible, std::int64_t tokens,
                                         const RouterSpec& spec, std::int64_t hidden_size) {
  if (host_visible) return 0;
  return routing_bytes(tokens, spec) + scratch_bytes(kMostHostRows * hidden_size);
}

void RoutingReader::fetch(const Routing& routing, const ConstMatrix& x) {
  routing_ = routing;
  x_ = x;
  const DevicePtr<std::byte> from = routing.experts.data.as<std::byte>();
  if (device_.host_visible()) {
    host_ = device_.on_host(from);
    return;
  }
  const std::size_t bytes = bytes_of(routing);
  staging_.release(0);
  host_ = memory::on_host(device_.staging(), staging_.take(bytes));
  device_.copy_out(Queue::kCompute, from, host_, bytes);
  if (x.rows > 0) {
    const Matrix there = scratch_matrix(staging_, x.rows, x.cols);
    device_.copy_out(Queue::kCompute, x.data, memory::on_host(device_.staging(), there.data),
                     static_cast<std::size_t>(x.rows * x.cols) * sizeof(float));
    x_ = there;
  }
  device_.record(Queue::kCompute, event_);
}

HostRouting RoutingReader::get() {
  device_.wait_for(event_);
  const auto first = routing_.experts.data.as<const std::byte>();
  const auto there = [&](auto pointer) {
    return host_ + (pointer.template as<const std::byte>() - first);
  };
  const std::size_t pairs = routing_.experts.size;
  const auto logits = static_cast<std::size_t>(routing_.logits.rows * routing_.logits.cols);
  return {{reinterpret_cast<const std::int32_t*>(there(routing_.experts.data)), pairs},
          {reinterpret_cast<const std::int32_t*>(there(routing_.used.data)), pairs},
          {reinterpret_cast<float*>(there(routing_.weights.data)), pairs},
          {reinterpret_cast<const float*>(there(routing_.logits.data)), logits},
          x_};
}

}  // namespace dsfp4::ops
