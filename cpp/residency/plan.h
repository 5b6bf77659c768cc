// How much of RAM the routed experts get, and whether everything else fits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace dsfp4::residency {

/// What the user gave, in bytes; nothing: planned.
struct RamWishes {
  std::optional<std::uint64_t> cpu_cache_size;  // of cached experts
  std::optional<std::uint64_t> prefetch_size;   // of slots for reads in flight and speculation
};

/// What there is to place, in bytes.
struct RamNeeds {
  std::uint64_t others = 0;        // everything but the routed experts
  std::uint64_t expert_bytes = 0;  // of all routed experts, loaded whole
  std::uint64_t slot_bytes = 0;    // of one in an ExpertStore
  std::uint64_t experts = 0;
  std::uint64_t experts_per_token = 0;  // of a layer
  /// Of `others`, what each layer would not need if it were streamed (LayerStream), and what the
  /// buffers of streamed layers take then.
  std::vector<std::uint64_t> layer_bytes;
  std::uint64_t layer_buffer_bytes = 0;
};

struct RamPlan {
  bool tiered = false;  // experts stay in the files; else everything is loaded
  std::size_t slots = 0;
  std::size_t cache_slots = 0;
  std::uint64_t expert_bytes = 0;  // of slots, or of all experts
  std::uint64_t total_bytes = 0;   // that and the others
  std::vector<bool> streamed;      // by layer; empty: none

  std::size_t streamed_layers() const;
};

/// Everything is loaded if it fits into `available` and no cpu_cache_size below all experts was
/// given. Else staging gets prefetch_size, by default two layers' choices, and the cache
/// cpu_cache_size, by default what is left. Where the others do not fit beside
/// the staging, as few layers as possible are streamed, evenly spread, so that each is read while
/// those between are computed. Throws MemoryLimitError where not even that is there, with the bytes
/// that are needed at least, and ParameterError for a prefetch_size below one expert.
RamPlan plan_ram(const RamNeeds& needs, const RamWishes& wishes, std::uint64_t available);

}  // namespace dsfp4::residency
