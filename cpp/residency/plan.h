// The place of each weight of a model, and what everything takes: decided here and nowhere else,
// from numbers alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "memory/limits.h"

namespace dsfp4::residency {

/// Bytes that a model takes.
struct ModelBytes {
  /// Of a step of so many rows.
  struct Step {
    std::int64_t rows = 0;
    std::uint64_t bytes = 0;  // activations, and what ops work in
  };

  std::uint64_t dense = 0;              // all weights but the routed experts
  std::vector<std::uint64_t> layers;    // of those, what a layer would not need if it were streamed
  std::uint64_t layer_buffer = 0;       // holds what is streamed of any layer
  std::uint64_t experts = 0;            // how many there are, in all layers
  std::uint64_t expert_bytes = 0;       // of all routed experts, loaded whole
  std::uint64_t expert_slot = 0;        // of one in an ExpertStore
  std::uint64_t experts_per_token = 0;  // of a layer
  std::uint64_t kv_block = 0;           // of the cached latents of ops::kKvBlockTokens tokens
  std::vector<Step> steps;        // chunks that a prompt may be cut into, ascending; at least one
  std::uint64_t reader = 0;       // staging of the reader
  std::uint64_t load_buffer = 0;  // on the way to memory that the host cannot touch
};

/// Bytes that there are.
struct Budgets {
  std::uint64_t ram_limit = 0;  // of the process; 0: memory::default_ram_limit
  /// As Account::committed() gives it.
  memory::MachineMemory machine;
  /// Bytes that the GPU which holds the model can still give; none: RAM holds it.
  std::optional<std::uint64_t> vram;
};

/// The user's wishes.
struct Wishes {
  std::int64_t max_context = 0;                 // tokens
  std::int64_t prefetch_layers = 1;             // streamed layers that are read ahead, at least 1
  std::optional<std::uint64_t> cpu_cache_size;  // bytes of cached experts
  std::optional<std::uint64_t> prefetch_size;   // of slots for reads in flight and speculation
};

/// A chunk's activations may be so large, in bytes; beyond the smaller amount they take an eighth
/// of what the experts' cache would have at most, below it a half.
inline constexpr std::uint64_t kActivationBytes = std::uint64_t{2} << 30;
inline constexpr std::uint64_t kSmallActivationBytes = std::uint64_t{1} << 30;

struct Plan {
  std::int64_t chunk = 0;         // rows of a prompt that pass the layers together
  bool tiered = false;            // experts stay in the files; else all are loaded
  std::vector<bool> streamed;     // by layer: its dense weights stay there, too; empty: none
  std::size_t layer_buffers = 0;  // that those go round through
  std::size_t slots = 0;          // for experts
  std::size_t cache_slots = 0;    // of those

  // In bytes, all in VRAM if the model is there.
  std::uint64_t dense_bytes = 0;   // layer buffers, too
  std::uint64_t expert_bytes = 0;  // of slots, or of all experts
  std::uint64_t kv_bytes = 0;
  std::uint64_t step_bytes = 0;

  // In all, in bytes.
  std::uint64_t ram_bytes = 0;   // as long as the model lives
  std::uint64_t load_bytes = 0;  // of RAM, besides, while it is loaded
  std::uint64_t vram_bytes = 0;

  std::vector<std::string> warnings;  // one sentence each

  std::size_t streamed_layers() const;
};

/// Bytes that the process can have without swapping.
std::uint64_t most_ram(const memory::MachineMemory& machine);

/// Everything is loaded if it fits into RAM and no cpu_cache_size below all experts was given. Else
/// staging gets prefetch_size, by default two layers' choices, and the cache cpu_cache_size, by
/// default what is left. Where the rest does not fit beside the staging, as few layers as possible
/// are streamed, evenly spread, so that each is read while those between are computed. Chunks are
/// as long as kActivationBytes allow where experts are read once for each, else the shortest.
/// A GPU gets the whole model.
///
/// Throws MemoryLimitError where not even that is there, with the bytes from which on it loads and
/// a max_context that would fit, if there is one; ParameterError for a prefetch_size below one
/// expert.
Plan make_plan(const ModelBytes& model, const Budgets& budgets, const Wishes& wishes);

/// `plan`, which is tiered, with slots as `wishes` say; the rest stays where it is. Throws as
/// make_plan().
Plan with_slots(const Plan& plan, const ModelBytes& model, const Budgets& budgets,
                const Wishes& wishes);

}  // namespace dsfp4::residency
