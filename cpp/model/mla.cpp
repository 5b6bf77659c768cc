#include "model/layers.h"

namespace dsfp4::model {
namespace {

using ops::ConstMatrix;
using ops::Matrix;
using ops::scratch_matrix;
using ops::ScratchScope;

// q = W_UQ norm(W_DQ x), or W_Q x in V2-Lite; [rows, heads * (nope + rope)]. kv = W_DKV x.
void project(const ModelSpec& spec, const AttentionWeights& weights, Phase phase, ops::Ops& ops,
             memory::Arena& arena, ConstMatrix x, Matrix q, Matrix kv) {
  if (spec.q_lora_rank == 0) {
    ops.linear_pair(weights.q_proj, q, weights.kv_a_proj_with_mqa, kv, x, phase);
    return;
  }
  const ScratchScope scope(arena);
  const Matrix compressed = scratch_matrix(arena, x.rows, spec.q_lora_rank);
  ops.linear_pair(weights.q_a_proj, compressed, weights.kv_a_proj_with_mqa, kv, x, phase);
  ops.rms_norm(compressed, weights.q_a_layernorm, kLoraNormEps, compressed);
  ops.linear(weights.q_b_proj, compressed, q, phase);
}

// Absorbed attention: queries are mapped into the latent space, so that keys and values are never
// expanded.
void decode_attention(const ops::MlaShape& shape, const WeightView& kv_b_proj, const Step& step,
                      ops::Ops& ops, memory::Arena& arena, ConstMatrix q, Matrix heads) {
  const Matrix q_abs = scratch_matrix(arena, q.rows, shape.heads * shape.kv_lora_rank);
  const Matrix attended = scratch_matrix(arena, q.rows, shape.heads * shape.kv_lora_rank);
  ops.absorb_query(shape, kv_b_proj, q, q_abs);
  ops.latent_attention(shape, step.sequences, q_abs, q, attended);
  ops.expand_value(shape, kv_b_proj, attended, heads);
}

}  // namespace

void mla_attention(const ModelSpec& spec, const AttentionWeights& weights, const Step& step,
                   ops::Ops& ops, memory::Arena& arena, ConstMatrix x, Matrix out) {
  const ScratchScope scope(arena);
  const ops::MlaShape& shape = spec.mla;

  const Matrix q = scratch_matrix(arena, x.rows, shape.heads * shape.qk_head_dim());
  // What the cache holds: the normed latent, then the key that all heads share, rotated.
  const Matrix kv = scratch_matrix(arena, x.rows, shape.cache_width());
  project(spec, weights, step.phase, ops, arena, x, q, kv);
  ops.mla_inputs(shape, step.sequences, step.cos_sin, weights.kv_a_layernorm, kLoraNormEps, q, kv);

  const Matrix heads = scratch_matrix(arena, x.rows, shape.heads * shape.v_head_dim);
  if (step.phase == Phase::kPrefill) {
    ops.prefill_attention(shape, weights.kv_b_proj, step.sequences, q, heads);
  } else {
    decode_attention(shape, weights.kv_b_proj, step, ops, arena, q, heads);
  }
  ops.linear(weights.o_proj, heads, out, step.phase);
}

std::size_t mla_scratch_bytes(const ModelSpec& spec, std::int64_t rows, Phase phase) {
  const ops::MlaShape& shape = spec.mla;
  std::size_t bytes = 0;
  for (const std::int64_t cols : {shape.heads * shape.qk_head_dim(), spec.q_lora_rank,
                                  shape.cache_width(), shape.heads * shape.v_head_dim}) {
    bytes += ops::scratch_bytes(rows * cols);
  }
  if (phase == Phase::kDecode) {
    bytes += 2 * ops::scratch_bytes(rows * shape.heads * shape.kv_lora_rank);
  }
  return bytes;
}

}  // namespace dsfp4::model
