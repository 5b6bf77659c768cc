// The truth: each op as its formula, values in FP32, sums in FP64, no blocking and no tricks.
// Threads split outputs, never a sum.
#include <algorithm>
#include <cmath>
#include <vector>

#include "format/block.h"
#include "format/scalar.h"
#include "ops/host_ops.h"

namespace dsfp4::ops {
namespace {

double dot(const float* a, const float* b, std::int64_t n) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

// scores -> probabilities, in place.
void softmax(std::vector<double>& scores) {
  const double largest = *std::max_element(scores.begin(), scores.end());
  double sum = 0.0;
  for (double& s : scores) sum += (s = std::exp(s - largest));
  for (double& s : scores) s /= sum;
}

float silu(float x) { return static_cast<float>(x / (1.0 + std::exp(-static_cast<double>(x)))); }

std::vector<float> decoded_row(const WeightView& weight, std::int64_t row) {
  std::vector<float> values(static_cast<std::size_t>(weight.cols));
  format::decode_row(unwrap(weight), row, values);
  return values;
}

float cached_value(const KvView& kv, const std::byte* row, std::int64_t i) {
  switch (kv.format) {
    case KvFormat::kF32:
      return reinterpret_cast<const float*>(row)[i];
    case KvFormat::kBf16:
      return format::bf16_to_float(reinterpret_cast<const std::uint16_t*>(row)[i]);
    case KvFormat::kFp8:
      return format::e4m3_to_float(reinterpret_cast<const std::uint8_t*>(row)[i]) * kv.scale;
  }
  return 0.0f;
}

// One sequence's cached rows [length, width], as floats.
std::vector<float> cached(const SequenceRows& sequence, std::int64_t width) {
  std::vector<float> rows;
  rows.reserve(static_cast<std::size_t>(sequence.length() * width));
  const KvView& kv = sequence.kv;
  const std::size_t row_bytes = static_cast<std::size_t>(width) * kv_value_bytes(kv.format);
  for (std::int64_t t = 0; t < sequence.length(); ++t) {
    const std::byte* row = kv_row(kv, t, row_bytes);
    for (std::int64_t i = 0; i < width; ++i) rows.push_back(cached_value(kv, row, i));
  }
  return rows;
}

class ReferenceBackend final : public HostBackend {
 public:
  using HostBackend::HostBackend;

  std::string_view name() const override { return "reference"; }
  KvFormat default_kv_format() const override { return KvFormat::kF32; }

  void rms_norm(ConstMatrix x, DeviceSpan<const float> weight, float eps, Matrix y) override {
    const float* factors = unwrap(weight.data);
    for (std::int64_t t = 0; t < x.rows; ++t) {
      const float* from = unwrap(x.row(t));
      float* to = unwrap(y.row(t));
      const double mean = dot(from, from, x.cols) / static_cast<double>(x.cols);
      const double scale = 1.0 / std::sqrt(mean + eps);
      for (std::int64_t i = 0; i < x.cols; ++i) {
        to[i] = static_cast<float>(from[i] * scale * factors[i]);
      }
    }
  }

  void linear(const WeightView& weight, ConstMatrix x, Matrix y, Phase, Inputs) override {
    pool_.parallel_for(weight.rows, 8, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        const std::vector<float> row = decoded_row(weight, r);
        for (std::int64_t t = 0; t < x.rows; ++t) {
          unwrap(y.row(t))[r] = static_cast<float>(dot(row.data(), unwrap(x.row(t)), x.cols));
        }
      }
    });
  }

  void silu_mul(Matrix gate, ConstMatrix up) override {
    for (std::int64_t t = 0; t < gate.rows; ++t) {
      float* to = unwrap(gate.row(t));
      const float* factors = unwrap(up.row(t));
      for (std::int64_t i = 0; i < gate.cols; ++i) to[i] = silu(to[i]) * factors[i];
    }
  }

  void prefill_attention(const MlaShape& shape, const WeightView& kv_b_proj,
                         std::span<const SequenceRows> batch, ConstMatrix q, Matrix out) override {
    pool_.parallel_for(shape.heads, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t h = begin; h < end; ++h) {
        for (const SequenceRows& sequence : batch) {
          prefill_head(shape, kv_b_proj, sequence, h, q, out);
        }
      }
    });
  }

  void absorb_query(const MlaShape& shape, const WeightView& kv_b_proj, ConstMatrix q,
                    Matrix q_abs) override {
    const std::int64_t nope = shape.qk_nope_head_dim;
    const std::int64_t lora = shape.kv_lora_rank;
    pool_.parallel_for(shape.heads, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t h = begin; h < end; ++h) {
        std::vector<std::vector<float>> w_uk;
        w_uk.reserve(static_cast<std::size_t>(nope));
        for (std::int64_t i = 0; i < nope; ++i) {
          w_uk.push_back(decoded_row(kv_b_proj, h * (nope + shape.v_head_dim) + i));
        }
        for (std::int64_t t = 0; t < q.rows; ++t) {
          const float* query = unwrap(q.row(t)) + h * shape.qk_head_dim();
          for (std::int64_t c = 0; c < lora; ++c) {
            double sum = 0.0;
            for (std::int64_t i = 0; i < nope; ++i) {
              sum += static_cast<double>(query[i]) *
                     w_uk[static_cast<std::size_t>(i)][static_cast<std::size_t>(c)];
            }
            unwrap(q_abs.row(t))[h * lora + c] = static_cast<float>(sum);
          }
        }
      }
    });
  }

  void latent_attention(const MlaShape& shape, std::span<const SequenceRows> batch,
                        ConstMatrix q_abs, ConstMatrix q, Matrix out) override {
    const std::int64_t lora = shape.kv_lora_rank;
    const std::int64_t width = shape.cache_width();
    for (const SequenceRows& sequence : batch) {
      const std::vector<float> cache = cached(sequence, width);
      pool_.parallel_for(shape.heads, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t h = begin; h < end; ++h) {
          for (std::int64_t r = 0; r < sequence.rows; ++r) {
            const std::int64_t t = sequence.first_row + r;
            const float* absorbed = unwrap(q_abs.row(t)) + h * lora;
            const float* q_pe = unwrap(q.row(t)) + h * shape.qk_head_dim() + shape.qk_nope_head_dim;
            std::vector<double> p;
            for (std::int64_t s = 0; s <= sequence.position + r; ++s) {
              const float* entry = cache.data() + s * width;
              p.push_back(
                  (dot(absorbed, entry, lora) + dot(q_pe, entry + lora, shape.qk_rope_head_dim)) *
                  shape.softmax_scale);
            }
            softmax(p);
            weighted_sum(p, cache.data(), width, lora, unwrap(out.row(t)) + h * lora);
          }
        }
      });
    }
  }

  void expand_value(const MlaShape& shape, const WeightView& kv_b_proj, ConstMatrix attended,
                    Matrix out) override {
    const std::int64_t v = shape.v_head_dim;
    const std::int64_t lora = shape.kv_lora_rank;
    pool_.parallel_for(shape.heads * v, 8, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t h = i / v;
        const std::int64_t row = h * (shape.qk_nope_head_dim + v) + shape.qk_nope_head_dim + i % v;
        const std::vector<float> w_uv = decoded_row(kv_b_proj, row);
        for (std::int64_t t = 0; t < attended.rows; ++t) {
          const float* latent = unwrap(attended.row(t)) + h * lora;
          unwrap(out.row(t))[i] = static_cast<float>(dot(w_uv.data(), latent, lora));
        }
      }
    });
  }

  void experts(std::span<const ExpertTask> tasks, std::int64_t top_k, ConstMatrix x, Matrix hidden,
               Matrix out, Phase phase) override {
    for (const ExpertTask& task : tasks) {
      for (const std::int32_t pair : task.pairs) {
        const ConstMatrix token{x.row(pair / top_k), 1, x.cols, x.stride};
        one_expert(*task.expert, token, hidden.slice(pair, 1), out.slice(pair, 1), phase);
      }
    }
  }

 protected:
  void add_fitting_experts(std::span<const ExpertTask> tasks, DeviceSpan<const float> weights,
                           std::int64_t top_k, ConstMatrix x, Matrix hidden, Matrix out, Matrix y,
                           Phase phase) override {
    const std::span<const float> mixing = unwrap(weights);
    std::int64_t row = 0;
    for (const ExpertTask& task : tasks) {
      for (const std::int32_t pair : task.pairs) {
        const ConstMatrix token{x.row(pair / top_k), 1, x.cols, x.stride};
        const Matrix result = out.slice(row, 1);
        one_expert(*task.expert, token, hidden.slice(row++, 1), result, phase);
        const float weight = mixing[static_cast<std::size_t>(pair)];
        const float* from = unwrap(result.data);
        float* to = unwrap(y.row(pair / top_k));
        for (std::int64_t i = 0; i < y.cols; ++i) to[i] += weight * from[i];
      }
    }
  }

 private:
  void one_expert(const ExpertView& expert, ConstMatrix token, Matrix gate, Matrix out,
                  Phase phase) {
    std::vector<float> up_values(static_cast<std::size_t>(gate.cols));
    const Matrix up{up_values.data(), 1, gate.cols, gate.cols};
    linear(expert.gate_proj, token, gate, phase, Inputs::kF32);
    linear(expert.up_proj, token, up, phase, Inputs::kF32);
    silu_mul(gate, up);
    linear(expert.down_proj, gate, out, phase, Inputs::kF32);
  }

  // out[i] = sum over s of p[s] * rows[s, i].
  static void weighted_sum(const std::vector<double>& p, const float* rows, std::int64_t stride,
                           std::int64_t cols, float* out) {
    for (std::int64_t i = 0; i < cols; ++i) {
      double sum = 0.0;
      for (std::size_t s = 0; s < p.size(); ++s) {
        sum += p[s] * rows[static_cast<std::int64_t>(s) * stride + i];
      }
      out[i] = static_cast<float>(sum);
    }
  }

  static void prefill_head(const MlaShape& shape, const WeightView& kv_b_proj,
                           const SequenceRows& sequence, std::int64_t h, ConstMatrix q,
                           Matrix out) {
    const std::int64_t nope = shape.qk_nope_head_dim;
    const std::int64_t expanded = nope + shape.v_head_dim;
    const std::int64_t width = shape.cache_width();
    const std::int64_t length = sequence.length();
    const std::vector<float> cache = cached(sequence, width);
    std::vector<float> kv(static_cast<std::size_t>(length * expanded));  // [k_nope | v] a token
    for (std::int64_t i = 0; i < expanded; ++i) {
      const std::vector<float> row = decoded_row(kv_b_proj, h * expanded + i);
      for (std::int64_t s = 0; s < length; ++s) {
        kv[static_cast<std::size_t>(s * expanded + i)] =
            static_cast<float>(dot(row.data(), cache.data() + s * width, shape.kv_lora_rank));
      }
    }
    for (std::int64_t r = 0; r < sequence.rows; ++r) {
      const std::int64_t t = sequence.first_row + r;
      const float* query = unwrap(q.row(t)) + h * shape.qk_head_dim();
      std::vector<double> p;
      for (std::int64_t s = 0; s <= sequence.position + r; ++s) {
        p.push_back((dot(query, kv.data() + s * expanded, nope) +
                     dot(query + nope, cache.data() + s * width + shape.kv_lora_rank,
                         shape.qk_rope_head_dim)) *
                    shape.softmax_scale);
      }
      softmax(p);
      weighted_sum(p, kv.data() + nope, expanded, shape.v_head_dim,
                   unwrap(out.row(t)) + h * shape.v_head_dim);
    }
  }
};

}  // namespace

std::unique_ptr<Ops> make_reference_ops(int threads) {
  return std::make_unique<ReferenceBackend>(threads);
}

}  // namespace dsfp4::ops
