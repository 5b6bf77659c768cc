// The place of each weight of a model, and what everything takes: decided here and nowhere else,
// from numbers alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "memory/limits.h"
#include "residency/dense_formats.h"

namespace dsfp4::residency {

/// Bytes that a model takes.
struct ModelBytes {
  /// Of a step of so many rows.
  struct Step {
    std::int64_t rows = 0;
    std::uint64_t bytes = 0;  // activations, and what ops work in
    /// Of RAM, where experts of a model on a GPU are computed by the host.
    std::uint64_t host_bytes = 0;
  };

  std::uint64_t dense = 0;            // all weights but the routed experts
  std::uint64_t embedding = 0;        // of those, the embedding, if it is not the head as well
  std::uint64_t host_embedding = 0;   // of the same, laid out as in the files
  std::vector<std::uint64_t> layers;  // of those, what a layer would not need if it were streamed
  /// The same of dense weights in certain formats.
  struct Converted {
    DenseFormats formats;
    std::uint64_t dense = 0;
    std::vector<std::uint64_t> layers;
  };
  DenseFormats formats;                 // that all this is of
  std::vector<Converted> converted;     // for a GPU that does not hold that, ever smaller
  std::uint64_t layer_buffer = 0;       // holds what is streamed of any layer
  std::uint64_t experts = 0;            // how many there are, in all layers
  std::uint64_t expert_bytes = 0;       // of all routed experts, loaded whole
  std::uint64_t expert_slot = 0;        // of one in an ExpertStore
  std::uint64_t device_slot = 0;        // of one in VRAM
  std::uint64_t experts_per_token = 0;  // of a layer
  std::uint64_t moe_layers = 0;
  std::uint64_t kv_block = 0;     // of the cached latents of ops::kKvBlockTokens tokens
  std::vector<Step> steps;        // chunks that a prompt may be cut into, ascending; at least one
  std::uint64_t reader = 0;       // staging of the reader
  std::uint64_t load_buffer = 0;  // on the way to memory that the host cannot touch, or converted
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
  std::int64_t max_context = 0;                   // tokens
  std::int64_t prefetch_layers = 1;               // streamed layers that are read ahead, at least 1
  std::optional<std::uint64_t> cpu_cache_size;    // bytes of cached experts
  std::optional<std::uint64_t> prefetch_size;     // of slots for reads in flight and speculation
  std::optional<std::uint64_t> max_experts = {};  // cached in VRAM
  /// Layers whose dense weights stay in VRAM: at most, and at least.
  std::optional<std::uint64_t> max_gpu_layers = {};
  std::uint64_t min_layers = 0;
  std::uint64_t gpu_reserved = 0;  // bytes of Budgets::vram that others get
};

/// VRAM slots for experts that only pass through, beside the cached ones.
inline constexpr std::size_t kDeviceRing = 8;

/// A chunk's activations may be so large, in bytes: where chunks are read for, and where they only
/// fill a GPU.
inline constexpr std::uint64_t kActivationBytes = std::uint64_t{4} << 30;
inline constexpr std::uint64_t kSmallActivationBytes = std::uint64_t{1} << 30;
/// Tokens of the answer to a long prompt: what its chunks save is weighed against these.
inline constexpr double kAnswerTokens = 500.0;

/// The memory of a model is VRAM if a GPU holds it, else RAM.
struct Plan {
  std::int64_t chunk = 0;         // rows of a prompt that pass the layers together
  bool tiered = false;            // experts stay in the files; else all are in the model's memory
  DenseFormats formats;           // of dense weights that do not stay in the files
  bool embedding_in_ram = false;  // in RAM as in the files, while the model's memory is VRAM
  /// By layer: its dense weights are not in the model's memory all the time; empty: none. They stay
  /// in the files, or, on a GPU, in RAM.
  std::vector<bool> streamed;
  std::size_t layer_buffers = 0;         // in the model's memory, that those go round through
  std::uint64_t layer_buffer_bytes = 0;  // of one, on a GPU
  std::size_t slots = 0;                 // for experts, in RAM: an ExpertStore's; 0: not tiered
  std::size_t cache_slots = 0;           // of those
  std::size_t device_slots = 0;          // for experts, in VRAM; 0: not tiered, or no GPU
  std::size_t device_cache_slots = 0;    // of those; the others are kDeviceRing

  // Bytes in the model's memory.
  std::uint64_t dense_bytes = 0;  // layer buffers, too; without the embedding_in_ram
  std::uint64_t kv_bytes = 0;
  std::uint64_t step_bytes = 0;
  std::uint64_t expert_bytes = 0;  // of all experts; tiered: of `slots`, which are always in RAM
  // Bytes in RAM, of a tiered model on a GPU.
  std::uint64_t embedding_bytes = 0;
  std::uint64_t staged_bytes = 0;  // of streamed layers
  std::uint64_t host_step_bytes = 0;
  // Bytes in VRAM, of the same.
  std::uint64_t device_expert_bytes = 0;  // of `device_slots`

  // Bytes in all.
  std::uint64_t ram_bytes = 0;   // as long as the model lives; the reader's, too
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
/// the shortest unless experts are read once for each: then, up to kActivationBytes, those with
/// which the fewest bytes are moved for a prompt of the longest chunk and an answer of
/// kAnswerTokens. A longer chunk leaves less room for cached experts, and may stream more layers.
///
/// A GPU gets the whole model if it fits into VRAM and neither max_experts nor cpu_cache_size is
/// below all experts, with the longest chunks that fit in kSmallActivationBytes. Else one with
/// routed experts gets three tiers: VRAM has the dense weights, the KV cache, a step and slots, of
/// which max_experts are cached, by default as many as fit; RAM has slots as above, and the
/// embedding, of which a token needs one row; the files have the rest. Chunks are as long as above.
/// Dense weights that do not fit get the first formats of ModelBytes::converted that do. Beyond
/// max_gpu_layers, or if not even the last formats fit, layers are streamed: as few as possible,
/// evenly spread, those with dense MLPs, which are larger, last.
///
/// Throws MemoryLimitError where not even that is there, with the bytes from which on it loads and
/// what would fit if it were lowered (a max_context, max_experts), if there is something;
/// ParameterError for a prefetch_size below one expert.
Plan make_plan(const ModelBytes& model, const Budgets& budgets, const Wishes& wishes);

/// `plan`, which is tiered, with slots of RAM and VRAM as `wishes` say; the rest stays. Throws as
/// make_plan().
Plan with_slots(const Plan& plan, const ModelBytes& model, const Budgets& budgets,
                const Wishes& wishes);

}  // namespace dsfp4::residency
