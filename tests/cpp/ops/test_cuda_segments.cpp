// Segments on a GPU: what is replayed computes what the same ops compute as they come.
#include <vector>

#include <gtest/gtest.h>

#include "ops/cuda_fixture.h"
#include "ops/scratch.h"

namespace dsfp4::ops {
namespace {

using format::WeightFormat;

constexpr MlaShape kShape{3, 48, 24, 20, 40, 0.13f};
constexpr std::int64_t kWidth = 68;  // of the cache, and of the embeddings
constexpr std::int64_t kVocab = 50;

class CudaSegmentsTest : public Cuda {
 protected:
  void SetUp() override {
    Cuda::SetUp();
    if (backend_ == nullptr) return;
    table_ = on_device(random_weight(WeightFormat::kF32, kVocab, kWidth, 1));
    query_ = on_device(
        random_weight(WeightFormat::kBF16, kShape.heads * kShape.qk_head_dim(), kWidth, 2));
    kv_b_ = on_device(random_weight(WeightFormat::kBF16,
                                    kShape.heads * (kShape.qk_nope_head_dim + kShape.v_head_dim),
                                    kShape.kv_lora_rank, 3));
    experts_ = {{on_device(random_weight(WeightFormat::kBF16, 32, 120, 4)),
                 on_device(random_weight(WeightFormat::kBF16, 32, 120, 5)),
                 on_device(random_weight(WeightFormat::kBF16, 120, 32, 6))}};
    Ops::Largest largest;  // so that no memory moves
    largest.mla = kShape;
    largest.rows = largest.dense_rows = 2;
    largest.context = 128;
    largest.width = largest.step_width = 132;
    largest.vocab = kVocab;
    largest.top_k = 1;
    largest.experts = experts_;
    backend_->reserve(largest);
  }

  // A sequence's blocks.
  std::vector<DevicePtr<std::byte>> blocks() {
    std::vector<DevicePtr<std::byte>> taken;
    for (int i = 0; i < 4; ++i) taken.push_back(arena_->take(kKvBlockTokens * kWidth * 2));
    return taken;
  }

  // One token of each sequence: a part with ids and rows, one that has both but names rows only,
  // something that is no segment, and a part that names neither.
  void step(std::span<const std::int32_t> ids, std::span<const SequenceRows> batch, bool segments) {
    const ScratchScope scope(*arena_);  // the same memory each time
    const auto rows = static_cast<std::int64_t>(ids.size());
    const Matrix x = scratch_matrix(*arena_, rows, kWidth);
    const Matrix q = scratch_matrix(*arena_, rows, query_.rows);
    const Matrix q_abs = scratch_matrix(*arena_, rows, kShape.heads * kShape.kv_lora_rank);
    const Matrix attended = scratch_matrix(*arena_, rows, kShape.heads * kShape.kv_lora_rank);
    const Matrix out = scratch_matrix(*arena_, rows, kShape.heads * kShape.v_head_dim);
    const Matrix hidden = scratch_matrix(*arena_, rows, 32);
    const Matrix routed = scratch_matrix(*arena_, rows, out.cols);
    const auto part = [&](std::int64_t number, std::span<const std::int32_t> its_ids,
                          std::span<const SequenceRows> its_batch,
                          const std::function<void()>& body) {
      const auto counted = [&] {
        ++bodies_;
        body();
      };
      if (segments) {
        backend_->segment({10 * rows + number, its_ids, its_batch}, counted);
      } else {
        body();
      }
    };
    part(0, ids, batch, [&] {
      backend_->embed(table_, ids, x);
      backend_->kv_append(batch, x);
    });
    part(1, {}, batch, [&] {
      backend_->linear(query_, x, q, Phase::kDecode);
      backend_->absorb_query(kShape, kv_b_, q, q_abs);
      backend_->latent_attention(kShape, batch, q_abs, q, attended);
      backend_->expand_value(kShape, kv_b_, attended, out);
    });
    std::vector<std::int32_t> pairs;
    for (std::int32_t p = 0; p < rows; ++p) pairs.push_back(p);
    const ExpertTask task{experts_.data(), pairs};
    backend_->experts({&task, 1}, 1, out, hidden, routed, Phase::kDecode);
    part(2, {}, {}, [&] { backend_->add(routed, out); });
    results_.push_back(on_host(out));
  }

  // Steps of one sequence and of two in turns, from a position where the rounded length changes.
  std::vector<std::vector<float>> run(bool segments) {
    results_.clear();
    bodies_ = 0;
    const std::vector<DevicePtr<std::byte>> caches[] = {blocks(), blocks(), blocks()};
    std::int64_t at[] = {0, 0, 0};
    const auto rows = [&](std::size_t sequence, std::int64_t row) {
      return SequenceRows{row, 1, at[sequence]++, {caches[sequence], 0, KvFormat::kBf16, 1.0f}};
    };
    std::int32_t id = 0;
    const auto next_id = [&] { return id = (id * 7 + 3) % static_cast<std::int32_t>(kVocab); };
    for (int i = 0; i < 70; ++i) {
      const std::int32_t one[] = {next_id()};
      const SequenceRows alone[] = {rows(0, 0)};
      step(one, alone, segments);
      if (i % 2 == 1) continue;
      const std::int32_t two[] = {next_id(), next_id()};
      const SequenceRows pair[] = {rows(1, 0), rows(2, 1)};
      step(two, pair, segments);
    }
    return results_;
  }

  WeightView table_, query_, kv_b_;
  std::vector<ExpertView> experts_;
  std::vector<std::vector<float>> results_;
  int bodies_ = 0;
};

TEST_F(CudaSegmentsTest, ComputeWhatTheirOpsCompute) {
  const std::vector<std::vector<float>> expected = run(false);
  const std::vector<std::vector<float>> got = run(true);
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t i = 0; i < got.size(); ++i) ASSERT_EQ(got[i], expected[i]) << "step " << i;
  // Twice for each part and number of rows; parts 0 and 1 of one row have two lengths.
  EXPECT_EQ(bodies_, 2 * 3 * 2 + 2 * 2);
}

TEST_F(CudaSegmentsTest, AreGivenUpWhereTheBodyFails) {
  const Matrix y = on_device(OwnedMatrix(2, 64));
  const Matrix ones = on_device(OwnedMatrix(2, 64));
  backend_->zero(y);
  const auto run = [&](bool fail) {
    backend_->segment({1, {}, {}}, [&] {
      backend_->add(ones, y);
      if (fail) backend_->device().synchronize();
    });
  };
  run(false);
  EXPECT_THROW(run(true), CudaError);
  for (int i = 0; i < 3; ++i) run(false);
  EXPECT_EQ(on_host(y), std::vector<float>(2 * 64, 4 * -777.0f));
}

}  // namespace
}  // namespace dsfp4::ops
