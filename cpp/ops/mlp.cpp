#include "ops/mlp.h"

#include "ops/scratch.h"

namespace dsfp4::ops {

void mlp(const ExpertView& weights, Ops& ops, memory::Arena& arena, ConstMatrix x, Matrix out,
         Phase phase) {
  const ScratchScope scope(arena);
  const Matrix gate = scratch_matrix(arena, x.rows, weights.gate_proj.rows);
  const Matrix up = scratch_matrix(arena, x.rows, weights.up_proj.rows);
  ops.linear_pair(weights.gate_proj, gate, weights.up_proj, up, x, phase);
  ops.silu_mul(gate, up);
  ops.linear(weights.down_proj, gate, out, phase);
}

std::size_t mlp_scratch_bytes(std::int64_t intermediate_size, std::int64_t rows) {
  return 2 * scratch_bytes(rows * intermediate_size);
}

}  // namespace dsfp4::ops
