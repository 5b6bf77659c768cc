#include "ops/measure/kernel_bench.h"
#include "ops/measure/random_data.h"
#include "ops/measure/timing.h"

namespace dsfp4::ops::measure {
namespace {

// Fills every copy of a cache with random latents.
void fill(Ops& ops, const CacheCopies& cache, std::int64_t tokens, std::int64_t width,
          std::int64_t copies) {
  std::vector<float> latents = random_floats(tokens * width, 3);
  for (std::int64_t i = 0; i < copies; ++i) {
    const SequenceRows all{0, tokens, 0, cache.view(i)};
    ops.kv_append({&all, 1}, {latents.data(), tokens, width, width});
  }
}

std::vector<format::EncodedMatrix> expansions(ThreadPool& pool, const MlaShape& shape,
                                              format::WeightFormat format, std::int64_t copies) {
  std::vector<format::EncodedMatrix> weights;
  weights.reserve(static_cast<std::size_t>(copies));
  const std::int64_t rows = shape.heads * (shape.qk_nope_head_dim + shape.v_head_dim);
  for (std::int64_t i = 0; i < copies; ++i) {
    weights.push_back(
        random_weight(pool, format, rows, shape.kv_lora_rank, static_cast<std::uint64_t>(i)));
  }
  return weights;
}

}  // namespace

std::map<std::string, Seconds> KernelBench::decode_attention(const MlaShape& shape,
                                                             format::WeightFormat kv_b_proj,
                                                             KvFormat cache_format,
                                                             std::int64_t context,
                                                             std::int64_t copies, int runs) {
  const std::int64_t width = shape.cache_width();
  const CacheCopies cache(context, width, cache_format, copies);
  fill(*ops_, cache, context, width, copies);
  const auto weights = expansions(pool_, shape, kv_b_proj, copies);
  const std::int64_t q_cols = shape.heads * shape.qk_head_dim();
  const std::int64_t lora_cols = shape.heads * shape.kv_lora_rank;
  const std::int64_t out_cols = shape.heads * shape.v_head_dim;
  std::vector<float> q = random_floats(q_cols, 4);
  std::vector<float> absorbed(static_cast<std::size_t>(lora_cols));
  std::vector<float> attended(static_cast<std::size_t>(lora_cols));
  std::vector<float> out(static_cast<std::size_t>(out_cols));
  const ConstMatrix query{q.data(), 1, q_cols, q_cols};
  const Matrix in{absorbed.data(), 1, lora_cols, lora_cols};
  const Matrix latent{attended.data(), 1, lora_cols, lora_cols};
  std::map<std::string, Seconds> seconds;
  for (int run = -1; run < runs; ++run) {
    const std::int64_t copy = (run + 1) % copies;
    const format::WeightView weight = weights[static_cast<std::size_t>(copy)].view();
    const SequenceRows last{0, 1, context - 1, cache.view(copy)};
    const double absorb = seconds_of([&] { ops_->absorb_query(shape, weight, query, in); });
    const double attend =
        seconds_of([&] { ops_->latent_attention(shape, {&last, 1}, in, query, latent); });
    const double expand = seconds_of(
        [&] { ops_->expand_value(shape, weight, latent, {out.data(), 1, out_cols, out_cols}); });
    if (run < 0) continue;
    seconds["absorb_query"].push_back(absorb);
    seconds["latent_attention"].push_back(attend);
    seconds["expand_value"].push_back(expand);
  }
  return seconds;
}

Seconds KernelBench::prefill_attention(const MlaShape& shape, format::WeightFormat kv_b_proj,
                                       KvFormat cache_format, std::int64_t position,
                                       std::int64_t rows, std::int64_t copies, int runs) {
  const std::int64_t width = shape.cache_width();
  const std::int64_t tokens = position + rows;
  const CacheCopies cache(tokens, width, cache_format, copies);
  fill(*ops_, cache, tokens, width, copies);
  const auto weights = expansions(pool_, shape, kv_b_proj, copies);
  const std::int64_t q_cols = shape.heads * shape.qk_head_dim();
  const std::int64_t out_cols = shape.heads * shape.v_head_dim;
  std::vector<float> q = random_floats(rows * q_cols, 4);
  std::vector<float> out(static_cast<std::size_t>(rows * out_cols));
  Seconds seconds;
  for (int run = -1; run < runs; ++run) {
    const std::int64_t copy = (run + 1) % copies;
    const SequenceRows sequence{0, rows, position, cache.view(copy)};
    const double took = seconds_of([&] {
      ops_->prefill_attention(shape, weights[static_cast<std::size_t>(copy)].view(), {&sequence, 1},
                              {q.data(), rows, q_cols, q_cols},
                              {out.data(), rows, out_cols, out_cols});
    });
    if (run >= 0) seconds.push_back(took);
  }
  return seconds;
}

}  // namespace dsfp4::ops::measure
