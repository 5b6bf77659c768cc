// A MoE layer's step as far as the host needs to know it: which experts, with which weights.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "memory/arena.h"
#include "ops/device.h"
#include "ops/views.h"

namespace dsfp4::ops {

/// A Routing where the host can read it, row-major as there.
struct HostRouting {
  std::span<const std::int32_t> experts;
  std::span<const std::int32_t> used;
  std::span<float> weights;
  std::span<const float> logits;  // [tokens, experts]
  ConstMatrix x = {};             // the layer's input, on the host; empty where nobody asked for it
};

/// Most rows of a step whose x comes to the host.
inline constexpr std::int64_t kMostHostRows = 16;

/// Room for a routing, in one piece, from `arena`.
Routing take_routing(memory::Arena& arena, std::int64_t tokens, const RouterSpec& spec);
/// The arena bytes that take_routing() takes.
std::size_t routing_bytes(std::int64_t tokens, const RouterSpec& spec);

/// Brings routings to the host, one at a time: a view where the host can touch the device's memory,
/// else one copy to staging memory and one event.
class RoutingReader {
 public:
  /// For up to `tokens` tokens, and x of `hidden_size` columns. Throws MemoryLimitError if the
  /// device has no staging memory for it.
  RoutingReader(Device& device, std::int64_t tokens, const RouterSpec& spec,
                std::int64_t hidden_size);

  /// Waits for a copy under way.
  ~RoutingReader();
  RoutingReader(const RoutingReader&) = delete;
  RoutingReader& operator=(const RoutingReader&) = delete;

  /// Queues the copy of a routing of take_routing(), and of `x` [up to kMostHostRows, hidden_size]
  /// where it has rows, behind the ops so far.
  void fetch(const Routing& routing, const ConstMatrix& x = {});
  /// The one that was fetched, after waiting for it; good until the next fetch().
  HostRouting get();
  /// Of staging memory, beside a device whose memory the host may touch or not.
  static std::size_t staging_bytes(bool host_visible, std::int64_t tokens, const RouterSpec& spec,
                                   std::int64_t hidden_size);

 private:
  Device& device_;
  memory::Arena staging_;
  Event event_;
  Routing routing_;
  std::byte* host_ = nullptr;  // where the host sees it
  ConstMatrix x_;              // and x
};

}  // namespace dsfp4::ops
