// A feed-forward block out of ops: dense layers, and the shared experts.
#pragma once

#include <cstddef>
#include <cstdint>

#include "memory/arena.h"
#include "ops/ops.h"

namespace dsfp4::ops {

/// out = down(silu(gate x) * up x); x and out are [rows, hidden]. Scratch comes from `arena` and is
/// given back.
void mlp(const ExpertView& weights, Ops& ops, memory::Arena& arena, ConstMatrix x, Matrix out,
         Phase phase);
/// The arena bytes that mlp() takes.
std::size_t mlp_scratch_bytes(std::int64_t intermediate_size, std::int64_t rows);

}  // namespace dsfp4::ops
