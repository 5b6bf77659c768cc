// Blocked attention against `reference` at odd and real widths, and the promise that neither chunk
// borders, company nor threads change a bit.
#include <vector>

#include <gtest/gtest.h>

#include "engine/kv_cache.h"
#include "ops/ops.h"
#include "ops/random_weight.h"

namespace dsfp4::ops {
namespace {

using testing::OwnedMatrix;
using testing::random_weight;
using testing::relative_error;

/// One sequence of random tokens: everything that attention reads, by position.
class Prompt {
 public:
  Prompt(const MlaShape& shape, std::int64_t tokens, KvFormat format, std::uint32_t seed)
      : shape_(shape),
        tokens_(tokens),
        format_(format),
        latents_(tokens, shape.cache_width(), seed),
        q_(tokens, shape.heads * shape.qk_head_dim(), seed + 1),
        kv_b_(random_weight(format::WeightFormat::kBF16,
                            shape.heads * (shape.qk_nope_head_dim + shape.v_head_dim),
                            shape.kv_lora_rank, seed + 2)),
        cache_(
            tokens, 1,
            static_cast<std::size_t>(kKvBlockTokens * shape.cache_width()) * kv_value_bytes(format),
            format),
        sequence_(cache_) {}

  /// Appends `rows` tokens and attends to all so far; the rows' heads.
  std::vector<float> step(Ops& ops, std::int64_t rows, bool decode) {
    SequenceRows part = sequence_.next_rows(0, rows);
    part.kv.scale = format_ == KvFormat::kFp8 ? 0.01f : 1.0f;
    const std::int64_t at = part.position;
    ops.kv_append({&part, 1}, latents_.view().slice(at, rows));
    const Matrix q = q_.view().slice(at, rows);
    OwnedMatrix out(rows, shape_.heads * shape_.v_head_dim);
    if (decode) {
      OwnedMatrix absorbed(rows, shape_.heads * shape_.kv_lora_rank);
      OwnedMatrix attended(rows, shape_.heads * shape_.kv_lora_rank);
      ops.absorb_query(shape_, kv_b_.view(), q, absorbed.view());
      ops.latent_attention(shape_, {&part, 1}, absorbed.view(), q, attended.view());
      ops.expand_value(shape_, kv_b_.view(), attended.view(), out.view());
    } else {
      ops.prefill_attention(shape_, kv_b_.view(), {&part, 1}, q, out.view());
    }
    sequence_.advance(rows);
    return out.values;
  }

  /// All tokens, in chunks of the given sizes (the last one again and again).
  std::vector<float> run(Ops& ops, bool decode, std::vector<std::int64_t> chunks) {
    std::vector<float> all;
    std::size_t next = 0;
    while (sequence_.length() < tokens_) {
      const std::int64_t rows = std::min(chunks[next], tokens_ - sequence_.length());
      const std::vector<float> part = step(ops, rows, decode);
      all.insert(all.end(), part.begin(), part.end());
      if (next + 1 < chunks.size()) ++next;
    }
    return all;
  }

 private:
  MlaShape shape_;
  std::int64_t tokens_;
  KvFormat format_;
  OwnedMatrix latents_, q_;
  format::EncodedMatrix kv_b_;
  engine::KvCache cache_;
  engine::Sequence sequence_;
};

std::vector<float> run(Ops& ops, const MlaShape& shape, std::int64_t tokens, KvFormat format,
                       bool decode, std::vector<std::int64_t> chunks) {
  Prompt prompt(shape, tokens, format, 50);
  return prompt.run(ops, decode, std::move(chunks));
}

constexpr MlaShape kOdd = {3, 50, 24, 20, 37, 0.13f};
constexpr MlaShape kTiny = {1, 1, 1, 2, 1, 0.7f};
constexpr MlaShape kReal = {2, 512, 128, 64, 128, 0.01f};

TEST(BlockedAttention, AgreesWithReferenceAtEveryWidth) {
  const auto reference = make_reference_ops(2);
  const auto cpu = make_cpu_ops(3);
  // 1 to 3 blocks of the cache, tiles of queries that end early, more heads than a register holds.
  for (const auto& [shape, tokens] :
       {std::pair(kOdd, std::int64_t{131}), std::pair(kTiny, std::int64_t{70}),
        std::pair(kReal, std::int64_t{65}),
        std::pair(MlaShape{21, 17, 9, 6, 5, 0.3f}, std::int64_t{66})}) {
    for (const KvFormat format : {KvFormat::kF32, KvFormat::kBf16, KvFormat::kFp8}) {
      for (const bool decode : {false, true}) {
        const auto expected = run(*reference, shape, tokens, format, decode, {tokens});
        const auto actual = run(*cpu, shape, tokens, format, decode, {tokens});
        EXPECT_LT(relative_error(actual, expected), 2e-6)
            << shape.heads << " heads, format " << static_cast<int>(format) << ", decode "
            << decode;
      }
    }
  }
}

TEST(BlockedAttention, ChunkBordersChangeNothing) {
  const auto cpu = make_cpu_ops(2);
  for (const bool decode : {false, true}) {
    const auto whole = run(*cpu, kOdd, 200, KvFormat::kBf16, decode, {200});
    for (const auto& chunks : std::vector<std::vector<std::int64_t>>{
             {1}, {3}, {63, 65}, {64}, {100}, {1, 127, 2, 70}, {7, 150}}) {
      EXPECT_EQ(run(*cpu, kOdd, 200, KvFormat::kBf16, decode, chunks), whole)
          << "first chunk " << chunks[0];
    }
  }
}

TEST(BlockedAttention, ThreadsChangeNothing) {
  // Long enough for several pieces of context; as many heads as make several groups.
  const MlaShape shape = {40, 16, 8, 4, 8, 0.4f};
  for (const bool decode : {false, true}) {
    const auto one = make_cpu_ops(1);
    const std::vector<std::int64_t> chunks = {1100, 2};
    const auto expected = run(*one, shape, 1105, KvFormat::kBf16, decode, chunks);
    for (const int threads : {2, 7}) {
      const auto many = make_cpu_ops(threads);
      EXPECT_EQ(run(*many, shape, 1105, KvFormat::kBf16, decode, chunks), expected);
    }
  }
}

TEST(BlockedAttention, LongContextAgreesWithReference) {
  const MlaShape shape = {2, 12, 4, 4, 4, 0.5f};
  const auto reference = make_reference_ops(2);
  const auto cpu = make_cpu_ops(2);
  Prompt expected(shape, 1200, KvFormat::kBf16, 60);
  Prompt actual(shape, 1200, KvFormat::kBf16, 60);
  for (const std::int64_t rows : {511, 1, 1, 500, 12}) {  // to and over the border of a piece
    const auto a = expected.step(*reference, rows, true);
    const auto b = actual.step(*cpu, rows, true);
    EXPECT_LT(relative_error(b, a), 2e-6);
  }
}

TEST(BlockedAttention, LargeScoresDoNotOverflow) {
  MlaShape shape = kOdd;
  shape.softmax_scale = 300.0f;  // exp of a score would be infinite
  const auto reference = make_reference_ops(1);
  const auto cpu = make_cpu_ops(2);
  for (const bool decode : {false, true}) {
    const auto expected = run(*reference, shape, 130, KvFormat::kF32, decode, {130});
    const auto actual = run(*cpu, shape, 130, KvFormat::kF32, decode, {130});
    EXPECT_LT(relative_error(actual, expected), 1e-2);
  }
}

TEST(BlockedAttention, EveryFormatOfTheExpansion) {
  const auto reference = make_reference_ops(1);
  const auto cpu = make_cpu_ops(2);
  for (const format::WeightFormat format : testing::kAllFormats) {
    const MlaShape shape = {3, 160, 24, 20, 40, 0.05f};  // FP8: more than one tile of columns
    const auto kv_b = random_weight(format, 3 * 64, 160, 7);
    OwnedMatrix q(2, 3 * 44, 8);
    OwnedMatrix latents(2, 180, 9);
    std::vector<std::byte> block(static_cast<std::size_t>(kKvBlockTokens * 180) * 4);
    const DevicePtr<std::byte> blocks[] = {block.data()};
    const SequenceRows rows{0, 2, 0, {blocks, 0, KvFormat::kF32, 1.0f}};
    const auto run_on = [&](Ops& ops, bool decode) {
      OwnedMatrix absorbed(2, 3 * 160);
      OwnedMatrix attended(2, 3 * 160);
      OwnedMatrix out(2, 3 * 40);
      ops.kv_append({&rows, 1}, latents.view());
      if (decode) {
        ops.absorb_query(shape, kv_b.view(), q.view(), absorbed.view());
        ops.latent_attention(shape, {&rows, 1}, absorbed.view(), q.view(), attended.view());
        ops.expand_value(shape, kv_b.view(), attended.view(), out.view());
      } else {
        ops.prefill_attention(shape, kv_b.view(), {&rows, 1}, q.view(), out.view());
      }
      return out.values;
    };
    for (const bool decode : {false, true}) {
      EXPECT_LT(relative_error(run_on(*cpu, decode), run_on(*reference, decode)), 2e-6)
          << format::weight_format_name(format) << ", decode " << decode;
    }
  }
}

}  // namespace
}  // namespace dsfp4::ops
