// Which attention kernel runs: by head sizes and the cache's format.
#include <algorithm>

#include "ops/cuda/kernels.h"

namespace dsfp4::ops::cuda {

bool prefill_attention(Device* device, const MlaShape* shape, const format::WeightView* kv_b_proj,
                       const KvRows* kv, SequencePart part, ConstMatrix q, Matrix out,
                       std::byte* workspace) {
  if (prefill_fast_fit(*shape, *kv_b_proj, kv->format)) {
    return prefill_fast(device, *shape, *kv_b_proj, *kv, part, q, out, workspace);
  }
  return prefill_plain(device, *shape, *kv_b_proj, *kv, part, q, out, workspace);
}

bool latent_attention(Device* device, const MlaShape* shape, const KvRows* kv, ConstMatrix q_abs,
                      ConstMatrix q, Matrix out, std::byte* workspace) {
  if (latent_fast_fit(device, *shape, kv->format)) {
    return latent_fast(device, *shape, *kv, q_abs, q, out, workspace);
  }
  return latent_plain(device, *shape, *kv, q_abs, q, out);
}

bool absorb_query(Device* device, const MlaShape* shape, const format::WeightView* kv_b_proj,
                  ConstMatrix q, Matrix q_abs) {
  if (q.rows == 0) return true;
  if (head_products_fit(*shape, *kv_b_proj, q_abs)) {
    return absorb_fast(device, *shape, *kv_b_proj, q, q_abs);
  }
  return absorb_plain(device, *shape, *kv_b_proj, q, q_abs);
}

bool expand_value(Device* device, const MlaShape* shape, const format::WeightView* kv_b_proj,
                  ConstMatrix attended, Matrix out) {
  if (attended.rows == 0) return true;
  if (head_products_fit(*shape, *kv_b_proj, attended)) {
    return expand_value_fast(device, *shape, *kv_b_proj, attended, out);
  }
  return expand_value_plain(device, *shape, *kv_b_proj, attended, out);
}

}  // namespace dsfp4::ops::cuda
