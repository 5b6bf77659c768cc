// Memory that the CPU backend's ops work in, counted ahead. Each size is that of the op which asks
// for it.
#include <algorithm>
#include <array>

#include "base/checked.h"
#include "ops/cpu/attention_parts.h"
#include "ops/cpu/cpu_backend.h"

namespace dsfp4::ops::cpu {

struct CpuBackend::StepMemory {
  std::array<std::size_t, kPackings> x{};  // packed activations
  std::size_t hidden = 0;                  // and the experts' between their two passes
  std::size_t tokens = 0;                  // of all pairs
  std::size_t places = 0;                  // of all pairs
  std::size_t groups = 0;                  // of tiles
  std::size_t partials = 0;                // of latent attention
  std::size_t thread = 0;                  // of one thread
};

std::size_t CpuBackend::most_scratch(const Isa& isa) {
  std::size_t most = isa.exact->scratch_bytes;
  for (const Matmul* matmul : isa.prefill) most = std::max(most, matmul->scratch_bytes);
  for (const Matmul* matmul : isa.decode) most = std::max(most, matmul->scratch_bytes);
  return isa.tiles == nullptr ? most : std::max(most, isa.tiles->scratch_bytes);
}

std::int64_t groups_at_once(std::size_t bytes) {
  constexpr std::size_t kGroupsBytes = 48u << 20;
  return std::max<std::int64_t>(1, static_cast<std::int64_t>(kGroupsBytes / bytes));
}

CpuBackend::StepMemory CpuBackend::step_memory(const Largest& largest) const {
  StepMemory memory;
  const auto add_packed = [&](const Matmul& matmul, std::int64_t rows, std::int64_t cols) {
    std::size_t& x = memory.x.at(static_cast<std::size_t>(matmul.packing));
    x = std::max(x, static_cast<std::size_t>(rows) * matmul.packed_bytes(cols));
  };
  add_packed(*isa_.exact, largest.dense_rows, largest.hidden_size);  // the router
  std::int64_t in_tiles = 0;                                         // columns
  for (std::size_t f = 0; f < format::kWeightFormats; ++f) {
    const std::int64_t width = largest.widest.all.at(f);
    if (width > 0) {
      add_packed(*isa_.prefill.at(f), largest.dense_rows, width);
      add_packed(*isa_.prefill.at(f), largest.rows, std::min(width, largest.step_width));
      add_packed(*isa_.decode.at(f), 1, width);
      if (isa_.prefill.at(f) != isa_.exact) in_tiles = std::max(in_tiles, width);
    }
    const std::int64_t down = largest.widest.expert_down.at(f);
    if (down == 0) continue;
    const auto pairs = static_cast<std::size_t>(added_pairs(largest.rows, largest.top_k));
    memory.hidden =
        std::max({memory.hidden, pairs * isa_.prefill.at(f)->packed_bytes(down),
                  static_cast<std::size_t>(largest.top_k) * isa_.decode.at(f)->packed_bytes(down)});
    memory.tokens = pairs * sizeof(std::int32_t);
    memory.places = memory.tokens;
  }

  memory.thread =
      std::max({multiply_bytes_, prefill_task_bytes(layer_, largest.mla, largest.dense_rows),
                latent_task_bytes(layer_, largest.mla, largest.mla.heads),
                absorb_task_bytes(layer_, largest.mla, 1)});
  memory.partials = latent_partial_bytes(layer_, largest.mla, largest.context);
  const bool experts = largest.moe_intermediate_size > 0;
  if (experts) {
    memory.thread = std::max(memory.thread, gate_and_up_bytes(kMostPieceRows, kExpertTokens));
  }
  if (isa_.tiles == nullptr) return memory;
  const Tiles& tiles = *isa_.tiles;
  const std::int64_t groups = ceil_div(largest.rows, kTileTokens);
  const std::int64_t dense_groups = ceil_div(largest.dense_rows, kTileTokens);
  memory.groups = std::max(
      static_cast<std::size_t>(dense_groups) * tiles.group_bytes(in_tiles),
      static_cast<std::size_t>(groups) * tiles.group_bytes(std::min(in_tiles, largest.step_width)));
  if (experts) {
    const std::int64_t wider = std::max(largest.hidden_size, largest.moe_intermediate_size);
    const std::int64_t task_groups =
        ceil_div(added_pairs(largest.rows, largest.top_k), kTileTokens);
    const std::int64_t most = groups_at_once(tiles.group_bytes(wider)) + task_groups;
    memory.groups = std::max(memory.groups, static_cast<std::size_t>(most) *
                                                (tiles.group_bytes(largest.hidden_size) +
                                                 tiles.group_bytes(largest.moe_intermediate_size)));
    memory.thread = std::max(memory.thread, gate_and_up_bytes(tiles.most_rows, kTileExpertTokens));
  }
  return memory;
}

std::uint64_t CpuBackend::working_bytes(const Largest& largest) const {
  const StepMemory memory = step_memory(largest);
  std::uint64_t bytes =
      memory.hidden + memory.tokens + memory.places + memory.groups + memory.partials;
  for (const std::size_t x : memory.x) bytes += x;
  return bytes + static_cast<std::uint64_t>(pool_.size()) * ThreadScratch::padded(memory.thread);
}

void CpuBackend::reserve(const Largest& largest) {
  const StepMemory memory = step_memory(largest);
  for (std::size_t packing = 0; packing < kPackings; ++packing) {
    x_memory_.at(packing).get(memory.x.at(packing));
  }
  hidden_memory_.get(memory.hidden);
  tokens_.reserve(memory.tokens / sizeof(std::int32_t));
  places_.reserve(memory.places / sizeof(std::int32_t));
  groups_memory_.get(memory.groups);
  partials_.get(memory.partials);
  thread_memory_.reserve(memory.thread);
}

}  // namespace dsfp4::ops::cpu
