// Latent attention of the CUDA backend, of a few rows and of many, against `reference`.
#include <memory>
#include <vector>

#include <gtest/gtest.h>

#include "engine/kv_cache.h"
#include "format/scalar.h"
#include "ops/cuda_fixture.h"
#include "ops/scratch.h"

namespace dsfp4::ops {
namespace {

using format::WeightFormat;

// Two sequences of different age in one batch, their caches filled by kv_append, then mla_inputs.
class CudaAttention : public Cuda {
 protected:
  struct Case {
    MlaShape shape;
    std::int64_t earlier[2];
    std::int64_t rows[2];
    WeightFormat kv_b = WeightFormat::kBF16;
    // Makes each 64 earlier tokens of the second sequence far likelier than those before to even
    // heads, and far less likely to odd ones: they have so much more as first rotary value.
    float rise = 0.0f;
  };

  std::vector<float> run(Ops& backend, const Case& c, KvFormat kv_format, bool decode) {
    const bool host = backend.device().host_visible();
    const std::int64_t width = c.shape.cache_width();
    const std::int64_t rows = c.rows[0] + c.rows[1];
    const std::size_t layer =
        static_cast<std::size_t>(kKvBlockTokens * width) * kv_value_bytes(kv_format);
    const std::int64_t room = c.earlier[0] + c.earlier[1] + rows + 4 * kKvBlockTokens;
    engine::KvCache cache(room, 2, layer, kv_format, backend.device().memory());
    const auto weight =
        random_weight(c.kv_b, c.shape.heads * (c.shape.qk_nope_head_dim + c.shape.v_head_dim),
                      c.shape.kv_lora_rank, 10);
    const auto place = [&](OwnedMatrix& m) { return host ? m.view() : on_device(m); };
    engine::Sequence sequences[2] = {engine::Sequence(cache), engine::Sequence(cache)};
    std::vector<SequenceRows> batch;
    std::int64_t row = 0;
    for (std::size_t i = 0; i < 2; ++i) {
      if (c.earlier[i] > 0) {
        OwnedMatrix earlier(c.earlier[i], width, static_cast<std::uint32_t>(20 + i));
        for (std::int64_t t = 0; i == 1 && c.rise > 0.0f && t < c.earlier[i]; ++t) {
          earlier.values[static_cast<std::size_t>(t * width + c.shape.kv_lora_rank)] =
              c.rise * static_cast<float>(t / kKvBlockTokens);
        }
        SequenceRows before = sequences[i].next_rows(0, c.earlier[i]);
        before.kv.layer_offset = layer;
        before.kv.scale = 0.01f;
        backend.kv_append({&before, 1}, place(earlier));
        sequences[i].advance(c.earlier[i]);
      }
      batch.push_back(sequences[i].next_rows(row, c.rows[i]));
      batch.back().kv.layer_offset = layer;
      batch.back().kv.scale = 0.01f;
      row += c.rows[i];
    }
    OwnedMatrix latents(rows, width, 30);
    OwnedMatrix q(rows, c.shape.heads * c.shape.qk_head_dim(), 31);
    for (float& v : q.values) v = format::bf16_to_float(format::float_to_bf16(v));
    for (std::int64_t r = c.rows[0]; c.rise > 0.0f && r < rows; ++r) {
      for (std::int64_t h = 0; h < c.shape.heads; ++h) {
        q.values[static_cast<std::size_t>(r * q.cols_ + h * c.shape.qk_head_dim() +
                                          c.shape.qk_nope_head_dim)] =
            h % 2 == 0 ? 1024.0f : -1024.0f;
      }
    }
    OwnedMatrix out(rows, c.shape.heads * c.shape.v_head_dim);
    OwnedMatrix q_abs(rows, c.shape.heads * c.shape.kv_lora_rank);
    OwnedMatrix attended(rows, c.shape.heads * c.shape.kv_lora_rank);
    const WeightView w = host ? WeightView(weight.view()) : on_device(weight);
    const Matrix q_view = place(q);
    OwnedMatrix angles(rows, c.shape.qk_rope_head_dim, 32);
    const std::vector<float> norm = random_values(c.shape.kv_lora_rank, 33);
    const DeviceSpan<const float> norm_there =
        host ? DeviceSpan<const float>(norm)
             : DeviceSpan<const float>(on_device(norm.data(), norm.size()), norm.size());
    backend.mla_inputs(c.shape, batch, place(angles), norm_there, 1e-6f, q_view, place(latents));
    const Matrix out_view = place(out);
    if (decode) {
      const Matrix abs_view = place(q_abs);
      const Matrix attended_view = place(attended);
      backend.absorb_query(c.shape, w, q_view, abs_view);
      backend.latent_attention(c.shape, batch, abs_view, q_view, attended_view);
      backend.expand_value(c.shape, w, attended_view, out_view);
    } else {
      backend.prefill_attention(c.shape, w, batch, q_view, out_view);
    }
    return host ? out.values : on_host(out_view);
  }

  void expect_agreement(const Case& c) {
    expect_agreement(c, false);
    expect_agreement(c, true);
  }
  void expect_agreement(const Case& c, bool decode) {
    for (const KvFormat kv : {KvFormat::kBf16, KvFormat::kFp8}) {
      const ScratchScope scope(*arena_);
      const std::vector<float> expected = run(*reference_, c, kv, decode);
      EXPECT_LT(relative_error(run(*backend_, c, kv, decode), expected), kTolerance)
          << "decode " << decode << " fp8 " << (kv == KvFormat::kFp8) << " heads " << c.shape.heads;
    }
  }
};

TEST_F(CudaAttention, OddHeads) {
  expect_agreement({{3, 48, 24, 20, 40, 0.13f}, {70, 3}, {5, 2}});
  expect_agreement({{2, 32, 16, 8, 24, 0.2f}, {0, 130}, {1, 1}, WeightFormat::kFp8Block});
}

TEST_F(CudaAttention, RealHeads) {
  expect_agreement({{4, 512, 128, 64, 128, 0.02f}, {70, 3}, {5, 66}});
  expect_agreement({{16, 512, 128, 64, 128, 0.02f}, {300, 0}, {1, 1}, WeightFormat::kFp8Block});
  expect_agreement({{20, 512, 128, 64, 128, 0.02f}, {63, 127}, {2, 1}});
  expect_agreement(
      {{70, 512, 128, 64, 128, 0.02f}, {0, 257}, {130, 1}, WeightFormat::kBF16, 0.64f});
  expect_agreement({{3, 512, 128, 64, 128, 0.02f}, {500, 0}, {70, 64}, WeightFormat::kNvfp4});
  expect_agreement({{2, 512, 128, 64, 128, 0.02f}, {77, 0}, {300, 5}});  // several blocks of rows
}

// From 8 tiles of the cache on, a split has two of them, one or none.
TEST_F(CudaAttention, DecodeOfShortCaches) {
  expect_agreement({{24, 512, 128, 64, 128, 0.02f}, {700, 513}, {1, 1}}, true);
  expect_agreement({{3, 512, 128, 64, 128, 0.02f}, {511, 3}, {1, 1}}, true);
  expect_agreement({{70, 512, 128, 64, 128, 0.02f}, {0, 600}, {1, 1}, WeightFormat::kBF16, 0.64f},
                   true);
}

}  // namespace
}  // namespace dsfp4::ops
