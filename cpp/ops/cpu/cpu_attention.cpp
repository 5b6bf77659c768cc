// Multi-head latent attention on the CPU. Prefill expands one head's keys and values at a time, so
// scratch is [context, nope + v] floats a thread; decode works on the BF16 latents as cached.
#include <algorithm>
#include <cmath>

#include "ops/cpu/cpu_backend.h"

namespace dsfp4::ops::cpu {
namespace {

using format::WeightView;

// Scores -> probabilities.
void softmax(float* scores, std::int64_t n) {
  const float largest = *std::max_element(scores, scores + n);
  float sum = 0.0f;
  for (std::int64_t s = 0; s < n; ++s) sum += (scores[s] = std::exp(scores[s] - largest));
  for (std::int64_t s = 0; s < n; ++s) scores[s] /= sum;
}

// Token `s` of a sequence's cache, converted to FP32 in `buffer` unless it is FP32 already.
const float* cached_row(const Kernels& kernels, const KvView& kv, std::int64_t s,
                        std::int64_t width, float* buffer) {
  const std::byte* row = kv_row(kv, s, static_cast<std::size_t>(width) * kv_value_bytes(kv.format));
  if (kv.format == KvFormat::kF32) return reinterpret_cast<const float*>(row);
  if (kv.format == KvFormat::kBf16) {
    kernels.bf16_to_float(reinterpret_cast<const std::uint16_t*>(row), buffer, width);
  } else {
    kernels.e4m3_to_float(reinterpret_cast<const std::uint8_t*>(row), kv.scale, buffer, width);
  }
  return buffer;
}

}  // namespace

void CpuBackend::prefill_attention(const MlaShape& shape, const WeightView& kv_b_proj,
                                   std::span<const SequenceRows> batch, ConstMatrix q, Matrix out) {
  const auto tasks = static_cast<std::int64_t>(batch.size()) * shape.heads;
  pool_.parallel_for(tasks, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      prefill_head(shape, kv_b_proj, batch[static_cast<std::size_t>(i / shape.heads)],
                   i % shape.heads, q, out);
    }
  });
}

void CpuBackend::prefill_head(const MlaShape& shape, const WeightView& kv_b_proj,
                              const SequenceRows& sequence, std::int64_t head, ConstMatrix q,
                              Matrix out) {
  const std::int64_t length = sequence.length();
  const std::int64_t width = shape.cache_width();
  const std::int64_t nope = shape.qk_nope_head_dim;
  const std::int64_t rope = shape.qk_rope_head_dim;
  const std::int64_t value = shape.v_head_dim;
  const std::int64_t expanded = nope + value;
  // [length, nope + rope | v]: the head's keys and values, then a row of scores.
  const std::int64_t stride = nope + rope + value;
  float* kv = thread_scratch(0, length * stride);
  float* latents = thread_scratch(1, length * width);
  float* scratch = thread_scratch(2, std::max(length, shape.kv_lora_rank));
  for (std::int64_t s = 0; s < length; ++s) {
    const float* row = cached_row(kernels_, sequence.kv, s, width, latents + s * width);
    if (row != latents + s * width) std::copy_n(row, width, latents + s * width);
    std::copy_n(row + shape.kv_lora_rank, rope, kv + s * stride + nope);
  }
  for (std::int64_t i = 0; i < expanded; ++i) {
    kernels_.decode_row(kv_b_proj, head * expanded + i, scratch);
    kernels_.dot_tokens(scratch, shape.kv_lora_rank, latents, width, length,
                        global_scale(kv_b_proj), kv + (i < nope ? i : i + rope), stride);
  }
  for (std::int64_t r = 0; r < sequence.rows; ++r) {
    const std::int64_t t = sequence.first_row + r;
    const std::int64_t visible = sequence.position + r + 1;
    kernels_.dot_tokens(q.row(t) + head * shape.qk_head_dim(), shape.qk_head_dim(), kv, stride,
                        visible, shape.softmax_scale, scratch, 1);
    softmax(scratch, visible);
    float* to = out.row(t) + head * value;
    std::fill_n(to, value, 0.0f);
    for (std::int64_t s = 0; s < visible; ++s) {
      kernels_.axpy(scratch[s], kv + s * stride + nope + rope, to, value);
    }
  }
}

void CpuBackend::absorb_query(const MlaShape& shape, const WeightView& kv_b_proj, ConstMatrix q,
                              Matrix q_abs) {
  const std::int64_t expanded = shape.qk_nope_head_dim + shape.v_head_dim;
  const std::int64_t lora = shape.kv_lora_rank;
  const ConstMatrix in = rounded(q, inputs_);
  const float scale = global_scale(kv_b_proj);
  pool_.parallel_for(shape.heads, 1, [&](std::int64_t begin, std::int64_t end) {
    float* row = thread_scratch(0, lora);
    for (std::int64_t h = begin; h < end; ++h) {
      for (std::int64_t t = 0; t < in.rows; ++t) std::fill_n(q_abs.row(t) + h * lora, lora, 0.0f);
      for (std::int64_t i = 0; i < shape.qk_nope_head_dim; ++i) {
        kernels_.decode_row(kv_b_proj, h * expanded + i, row);
        for (std::int64_t t = 0; t < in.rows; ++t) {
          kernels_.axpy(in.row(t)[h * shape.qk_head_dim() + i] * scale, row,
                        q_abs.row(t) + h * lora, lora);
        }
      }
    }
  });
}

void CpuBackend::latent_attention(const MlaShape& shape, std::span<const SequenceRows> batch,
                                  ConstMatrix q_abs, ConstMatrix q, Matrix out) {
  for (const SequenceRows& sequence : batch) {
    const std::int64_t tasks = sequence.rows * shape.heads;
    pool_.parallel_for(tasks, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        attend_head(shape, sequence, i / shape.heads, i % shape.heads, q_abs, q, out);
      }
    });
  }
}

void CpuBackend::attend_head(const MlaShape& shape, const SequenceRows& sequence, std::int64_t row,
                             std::int64_t head, ConstMatrix q_abs, ConstMatrix q, Matrix out) {
  const std::int64_t lora = shape.kv_lora_rank;
  const std::int64_t width = shape.cache_width();
  const std::int64_t visible = sequence.position + row + 1;
  const std::int64_t t = sequence.first_row + row;
  float* query = thread_scratch(0, 2 * width);  // [absorbed | q_pe], then one cached row
  float* buffer = query + width;
  float* scores = thread_scratch(1, visible);
  std::copy_n(q_abs.row(t) + head * lora, lora, query);
  std::copy_n(q.row(t) + head * shape.qk_head_dim() + shape.qk_nope_head_dim,
              shape.qk_rope_head_dim, query + lora);
  for (std::int64_t s = 0; s < visible; ++s) {
    const float* entry = cached_row(kernels_, sequence.kv, s, width, buffer);
    kernels_.dot_tokens(query, width, entry, 0, 1, shape.softmax_scale, scores + s, 1);
  }
  softmax(scores, visible);
  float* to = out.row(t) + head * lora;
  std::fill_n(to, lora, 0.0f);
  for (std::int64_t s = 0; s < visible; ++s) {
    const float* entry = cached_row(kernels_, sequence.kv, s, width, buffer);
    kernels_.axpy(scores[s], entry, to, lora);
  }
}

void CpuBackend::expand_value(const MlaShape& shape, const WeightView& kv_b_proj,
                              ConstMatrix attended, Matrix out) {
  const std::int64_t value = shape.v_head_dim;
  const std::int64_t expanded = shape.qk_nope_head_dim + value;
  const std::int64_t lora = shape.kv_lora_rank;
  const ConstMatrix in = rounded(attended, inputs_);
  pool_.parallel_for(shape.heads * value, 16, [&](std::int64_t begin, std::int64_t end) {
    float* row = thread_scratch(0, lora);
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t head = i / value;
      kernels_.decode_row(kv_b_proj, head * expanded + shape.qk_nope_head_dim + i % value, row);
      kernels_.dot_tokens(row, lora, in.data + head * lora, in.stride, in.rows,
                          global_scale(kv_b_proj), out.data + i, out.stride);
    }
  });
}

}  // namespace dsfp4::ops::cpu
