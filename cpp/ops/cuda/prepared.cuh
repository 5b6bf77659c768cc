// What prefill attention shares with the products of many tokens: prepared activations.
#pragma once

#include "ops/cuda/common.cuh"

namespace dsfp4::ops::cuda {

/// Cached tokens [0, length) of the sequence whose blocks begin at `first_block`: latents as rows
/// prepared for linear_prepared() with kv_b_proj's format, rotated keys as plain rows.
bool gather_latents(Device*, const MlaShape& shape, const format::WeightView& kv_b_proj,
                    const KvRows& kv, std::int64_t first_block, std::int64_t length,
                    __nv_bfloat16* latents, __nv_bfloat16* keys);
/// out [tokens, weight.rows], BF16.
bool linear_prepared(Device*, const format::WeightView& weight, const __nv_bfloat16* prepared,
                     std::int64_t tokens, __nv_bfloat16* out);

}  // namespace dsfp4::ops::cuda
