// The launchers of the plugin, one file a group; plugin.cu gathers them in the table. Contracts:
// see ops/ops.h and ops/cuda/abi.h.
#pragma once

#include "ops/cuda/abi.h"

namespace dsfp4::ops::cuda {

// elementwise.cu
bool embed(Device*, const format::WeightView* table, const std::int32_t* ids, Matrix out);
bool rms_norm(Device*, ConstMatrix x, const float* weight, float eps, Matrix y);
bool silu_mul(Device*, Matrix gate, ConstMatrix up);
bool zero(Device*, Matrix y);
bool add(Device*, ConstMatrix x, Matrix y);
bool rope(Device*, Matrix x, std::int64_t heads, std::int64_t head_stride, ConstMatrix cos_sin);
bool combine(Device*, ConstMatrix pairs, const float* weights, std::int64_t top_k, Matrix y);
bool kv_append(Device*, const KvRows* kv, ConstMatrix x);
bool mla_inputs(Device*, const MlaShape* shape, const KvRows* kv, ConstMatrix cos_sin,
                const float* kv_norm, float eps, Matrix q, Matrix x);

// route.cu
bool route(Device*, const RouterSpec* spec, ConstMatrix logits, const float* bias,
           const std::int32_t* forced, DeviceRouting out);

// linear.cu chooses among the kernels below.
bool linear(Device*, const format::WeightView* weight, ConstMatrix x, Matrix y, Inputs inputs,
            std::byte* workspace);
bool linear_pair(Device*, const format::WeightView* first, Matrix y_first,
                 const format::WeightView* second, Matrix y_second, ConstMatrix x,
                 std::byte* workspace);

// linear_plain.cu: any shape and alignment.
bool linear_plain(Device*, const format::WeightView& weight, ConstMatrix x, Matrix y,
                  Inputs inputs);

// linear_small.cu: rows in words of 16 bytes; best up to 8 tokens.
bool linear_small(Device*, const format::WeightView& weight, ConstMatrix x, Matrix y);
bool linear_small_pair(Device*, const format::WeightView& first, Matrix y_first,
                       const format::WeightView& second, Matrix y_second, ConstMatrix x);

// linear_large.cu: rows of whole chunks (32 BF16, 64 FP8, 128 FP4 columns); for many tokens.
bool linear_large_fit(const format::WeightView& weight);
bool linear_large(Device*, const format::WeightView& weight, ConstMatrix x, Matrix y,
                  std::byte* workspace);
bool experts_large_fit(const ExpertView& expert, std::int64_t experts);
/// Fills `routed`; the weighted sum is combine()'s.
bool experts_large(Device*, const ExpertView* table, const ExpertView& first, std::int64_t experts,
                   DeviceRouting routing, std::int64_t top_k, ConstMatrix x, Matrix hidden,
                   Matrix routed, std::byte* workspace);

// experts_small.cu: a few tokens; `fit` says whether these experts can be read that way. `slots` of
// a token: top_k, and one more with `shared`. `hidden` holds digits where one_token.cuh takes them.
bool experts_small_fit(Device*, const ExpertView& expert, ConstMatrix x, ConstMatrix hidden,
                       std::int64_t slots);
bool experts_small(Device*, const ExpertView* table, const ExpertView& first, std::int64_t experts,
                   DeviceRouting routing, std::int64_t top_k, ConstMatrix x, Matrix hidden,
                   Matrix y, const ExpertView* shared);

// attention_plain.cu: any head size.
bool prefill_plain(Device*, const MlaShape& shape, const format::WeightView& kv_b_proj,
                   const KvRows& kv, SequencePart part, ConstMatrix q, Matrix out,
                   std::byte* workspace);
bool latent_plain(Device*, const MlaShape& shape, const KvRows& kv, ConstMatrix q_abs,
                  ConstMatrix q, Matrix out);
bool absorb_plain(Device*, const MlaShape& shape, const format::WeightView& kv_b_proj,
                  ConstMatrix q, Matrix q_abs);
bool expand_value_plain(Device*, const MlaShape& shape, const format::WeightView& kv_b_proj,
                        ConstMatrix attended, Matrix out);

// attention_decode.cu: 512 + 64 values a token, BF16 or FP8 cache.
bool latent_fast_fit(Device*, const MlaShape& shape, KvFormat format);
bool latent_fast(Device*, const MlaShape& shape, const KvRows& kv, ConstMatrix q_abs, ConstMatrix q,
                 Matrix out, std::byte* workspace);

// head_products.cu: latents of a multiple of 256 values, BF16 or FP8; the router's exact product.
bool head_products_fit(const MlaShape& shape, const format::WeightView& kv_b_proj,
                       ConstMatrix attended);
bool absorb_fast(Device*, const MlaShape& shape, const format::WeightView& kv_b_proj, ConstMatrix q,
                 Matrix q_abs);
bool expand_value_fast(Device*, const MlaShape& shape, const format::WeightView& kv_b_proj,
                       ConstMatrix attended, Matrix out);
bool linear_exact_fit(const format::WeightView& weight, ConstMatrix x);
bool linear_exact(Device*, const format::WeightView& weight, ConstMatrix x, Matrix y);

// attention_prefill.cu: keys 128 + 64, values 128, BF16 or FP8 cache.
bool prefill_fast_fit(const MlaShape& shape, const format::WeightView& kv_b_proj, KvFormat format);
bool prefill_fast(Device*, const MlaShape& shape, const format::WeightView& kv_b_proj,
                  const KvRows& kv, SequencePart part, ConstMatrix q, Matrix out,
                  std::byte* workspace);

// attention.cu chooses.
bool prefill_attention(Device*, const MlaShape* shape, const format::WeightView* kv_b_proj,
                       const KvRows* kv, SequencePart part, ConstMatrix q, Matrix out,
                       std::byte* workspace);
bool absorb_query(Device*, const MlaShape* shape, const format::WeightView* kv_b_proj,
                  ConstMatrix q, Matrix q_abs);
bool expand_value(Device*, const MlaShape* shape, const format::WeightView* kv_b_proj,
                  ConstMatrix attended, Matrix out);
bool latent_attention(Device*, const MlaShape* shape, const KvRows* kv, ConstMatrix q_abs,
                      ConstMatrix q, Matrix out, std::byte* workspace);

// experts.cu
bool routed_experts(Device*, const ExpertView* table, const ExpertView* first, std::int64_t experts,
                    DeviceRouting routing, std::int64_t top_k, ConstMatrix x, Matrix hidden,
                    Matrix routed, Matrix y, const ExpertView* shared, std::byte* workspace);
bool takes_shared(Device*, const ExpertView* first, const ExpertView* shared, std::int64_t tokens,
                  std::int64_t top_k);

// expert_tasks.cu
bool expert_tasks(Device*, const ExpertTask* tasks, std::int64_t count, std::int64_t top_k,
                  ConstMatrix x, Matrix hidden, Matrix out, std::byte* workspace);
bool add_expert_tasks(Device*, const ExpertTask* tasks, std::int64_t count, std::int64_t top_k,
                      ConstMatrix x, const float* weights, Matrix hidden, Matrix out, Matrix y,
                      std::byte* workspace);

// sampler.cu
bool sample(Device*, ConstMatrix logits, const SampleSpec* spec, std::byte* workspace,
            std::int32_t* id);

// measure.cu
bool read_all(Device*, const std::byte* from, std::size_t bytes, std::byte* sink);
bool multiply_loop(Device*, int rounds, std::byte* sink, double* flops);
bool mark(Device*, int slot);
bool elapsed(Device*, int from, int to, float* milliseconds);

}  // namespace dsfp4::ops::cuda
