// The ops of the emulated device against what they promise: without that, tests that use them prove
// nothing.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "emulated/fixture.h"

namespace dsfp4::ops::testing {
namespace {

using format::WeightFormat;

constexpr float kEps = 1e-6f;
constexpr std::int64_t kWidth = 64;
constexpr MlaShape kMla{2, 32, 16, 8, 16, 0.2f};

// Every op once, each on the results of others.
std::vector<float> everything(Ops& ops, WeightFormat format) {
  Room room(ops.device());
  const std::vector<std::int32_t> ids{3, 1, 4, 1, 5};
  const auto rows = static_cast<std::int64_t>(ids.size());
  const Phase phase = Phase::kDecode;

  const Matrix x = room.matrix(rows, kWidth);
  const Matrix n = room.matrix(rows, kWidth);
  const Matrix norm = room.matrix(1, kWidth, 1);
  ops.embed(room.weight(WeightFormat::kBF16, 32, kWidth, 2), ids, x);
  ops.rms_norm(x, DeviceSpan<const float>(norm.data, kWidth), kEps, n);

  const Matrix q = room.matrix(rows, kMla.heads * kMla.qk_head_dim());
  const Matrix kv = room.matrix(rows, kMla.cache_width());
  ops.linear_pair(room.weight(format, q.cols, kWidth, 3), q,
                  room.weight(format, kv.cols, kWidth, 4), kv, n, phase);
  const std::size_t layer = static_cast<std::size_t>(kKvBlockTokens * kMla.cache_width()) * 4;
  const std::vector<DevicePtr<std::byte>> blocks{room.bytes(2 * layer), room.bytes(2 * layer)};
  const std::span<const DevicePtr<std::byte>> all(blocks);
  const std::vector<SequenceRows> batch{{0, 3, 0, {all.first(1), layer, KvFormat::kF32, 1.0f}},
                                        {3, 2, 0, {all.last(1), layer, KvFormat::kF32, 1.0f}}};
  const Matrix angles = room.matrix(rows, kMla.qk_rope_head_dim, 5);
  const Matrix latent_norm = room.matrix(1, kMla.kv_lora_rank, 6);
  ops.mla_inputs(kMla, batch, angles,
                 {latent_norm.data, static_cast<std::size_t>(latent_norm.cols)}, kEps, q, kv);

  const WeightView kv_b = room.weight(format, kMla.heads * 32, kMla.kv_lora_rank, 7);
  const Matrix prefilled = room.matrix(rows, kMla.heads * kMla.v_head_dim);
  const Matrix q_abs = room.matrix(rows, kMla.heads * kMla.kv_lora_rank);
  const Matrix attended = room.matrix(rows, kMla.heads * kMla.kv_lora_rank);
  const Matrix decoded = room.matrix(rows, kMla.heads * kMla.v_head_dim);
  ops.prefill_attention(kMla, kv_b, batch, q, prefilled);
  ops.absorb_query(kMla, kv_b, q, q_abs);
  ops.latent_attention(kMla, batch, q_abs, q, attended);
  ops.expand_value(kMla, kv_b, attended, decoded);
  ops.add(prefilled, decoded);
  const Matrix out = room.matrix(rows, kWidth);
  ops.linear(room.weight(format, kWidth, decoded.cols, 8), decoded, out, phase);
  ops.rope(out, 4, 16, angles);
  ops.add(out, x);
  ops.kv_append(batch, room.matrix(rows, kMla.cache_width(), 9));
  ops.latent_attention(kMla, batch, q_abs, q, attended);

  const RouterSpec spec{.experts = 4, .top_k = 2};
  const Matrix logits = room.matrix(rows, spec.experts);
  const auto pairs = static_cast<std::size_t>(rows * spec.top_k);
  const Routing routing{room.array<std::int32_t>(pairs),
                        room.array<std::int32_t>(pairs),
                        room.array<float>(pairs),
                        {}};
  ops.linear(room.weight(WeightFormat::kF32, spec.experts, kWidth, 10), x, logits, phase,
             Inputs::kF32);
  ops.route(spec, logits, {}, {}, routing);
  std::vector<ExpertView> experts;
  for (std::uint32_t e = 0; e < 4; ++e) {
    experts.push_back({room.weight(format, 32, kWidth, 20 + e),
                       room.weight(format, 32, kWidth, 30 + e),
                       room.weight(format, kWidth, 32, 40 + e)});
  }
  const Matrix hidden = room.matrix(rows * spec.top_k, 32);
  const Matrix routed = room.matrix(rows * spec.top_k, kWidth);
  const Matrix y = room.matrix(rows, kWidth);
  ops.zero(y);
  const std::vector<std::int32_t> used = room.get(routing.used);
  std::vector<std::vector<std::int32_t>> chosen(experts.size());
  for (std::size_t p = 0; p < used.size(); ++p) {
    chosen[static_cast<std::size_t>(used[p])].push_back(static_cast<std::int32_t>(p));
  }
  std::vector<ExpertTask> tasks;
  for (std::size_t e = 0; e < experts.size(); ++e) tasks.push_back({&experts[e], chosen[e]});
  if (ops.has_routed_experts()) {
    ops.routed_experts(experts, routing, spec.top_k, x, hidden, routed, y, nullptr);
  } else {
    ops.experts(tasks, spec.top_k, x, hidden, routed, phase);
    ops.combine(routed, routing.weights, spec.top_k, y);
  }
  ops.add_experts(tasks, routing.weights, spec.top_k, x, hidden, routed, y, phase);
  tasks.clear();  // what an op was given is the caller's again
  chosen.clear();
  ops.silu_mul(y, x);

  std::vector<float> results = room.get(y);
  for (const Matrix& m : {x, attended, decoded}) {
    const std::vector<float> values = room.get(m);
    results.insert(results.end(), values.begin(), values.end());
  }
  return results;
}

TEST(EmulatedArithmetic, ComputesWhatReferenceDoes) {
  const auto reference = make_reference_ops(1);
  for (const WeightFormat format : kAllFormats) {
    const std::vector<float> expected = everything(*reference, format);
    EXPECT_FALSE(std::ranges::any_of(expected, [](float v) { return std::isnan(v); }));
    for (const bool routed : {false, true}) {
      EmulatedOps ops({.routed_experts = routed});
      EXPECT_EQ(everything(ops, format), expected) << format::weight_format_name(format);
      EXPECT_EQ(ops.emulated()->memory().allocations(), 0u);
    }
  }
}

// ---- segments

class EmulatedSegments : public EmulatedFixture {
 protected:
  static constexpr std::size_t kLayer = kKvBlockTokens * 8 * sizeof(float);

  // Two tokens at `position` of a cache: embedded and stored in the second layer.
  void step(
      std::vector<std::int32_t> ids, std::int64_t position, DevicePtr<std::byte> block,
      const std::function<void()>& last = [] {}) {
    const std::vector<DevicePtr<std::byte>> blocks{block};
    const std::vector<SequenceRows> batch{{0, 2, position, {blocks, kLayer, KvFormat::kF32, 1.0f}}};
    std::vector<SequenceRows> first_layer = batch;
    first_layer[0].kv.layer_offset = 0;
    ops.segment({7, ids, first_layer}, [&] {
      ops.embed(table, ids, rows);
      ops.add(rows, rows);
      ops.kv_append(batch, rows);
      last();
    });
  }
  std::vector<float> cached(DevicePtr<std::byte> block, std::int64_t position) {
    const auto first = (block + kLayer).as<float>() + position * 8;
    return room.get(DeviceSpan<float>(first, 16));
  }
  std::vector<float> expected(std::int32_t first_id) const {
    const auto first = table_values.begin() + first_id * 8;
    return doubled({first, first + 16});
  }

  const WeightView table = room.weight(WeightFormat::kF32, 6, 8, 3);
  const std::vector<float> table_values = random_values(48, 3);
  const Matrix rows = room.matrix(2, 8);
  const DevicePtr<std::byte> one = room.bytes(2 * kLayer);
  const DevicePtr<std::byte> other = room.bytes(2 * kLayer);
};

TEST_F(EmulatedSegments, ReplaysTakeIdsAndPlacesAndNotTheBody) {
  step({0, 1}, 0, one);
  step({1, 2}, 2, one);
  EXPECT_EQ(device.counts().bodies, 2);
  step({2, 3}, 4, one);
  step({4, 5}, 9, other, [] { FAIL() << "the body runs"; });
  EXPECT_EQ(cached(one, 0), expected(0));
  EXPECT_EQ(cached(one, 2), expected(1));
  EXPECT_EQ(cached(one, 4), expected(2));
  EXPECT_EQ(cached(other, 9), expected(4));
  EXPECT_TRUE(all_nan(cached(other, 0)));
  EXPECT_EQ(device.counts().bodies, 2);
  EXPECT_EQ(device.counts().replayed, 2);
  EXPECT_EQ(device.counts().ops, 12);
}

TEST_F(EmulatedSegments, ALongerContextOrMoreRowsAreAnotherRecording) {
  for (const std::int64_t position : {0, 62, 4, 62}) step({0, 1}, position, one);
  EXPECT_EQ(device.counts().replayed, 2);
  const std::vector<std::int32_t> ids{1};
  int bodies = 0;
  for (const std::int64_t part : {7, 8, 7, 7}) {
    ops.segment({part, ids, {}}, [&] { ++bodies; });
  }
  EXPECT_EQ(bodies, 3);
}

TEST_F(EmulatedSegments, WhatCannotBeRecordedIsRefused) {
  const Event event = device.make_event();
  const float* from = staged(values);
  float value = 0.0f;
  const ExpertView expert{};
  const std::vector<std::int32_t> pairs{0};
  const std::vector<ExpertTask> tasks{{&expert, pairs}};
  const std::vector<std::int32_t> forced{0};
  const std::function<void()> refused[] = {
      [&] { device.upload(&value, slot.data, 4); },
      [&] { device.download(slot.data, &value, 4); },
      [&] { copy_in(from, slot); },
      [&] { device.copy_out(Queue::kDownload, slot.data, const_cast<float*>(from), 4); },
      [&] { device.record(Queue::kUpload, event); },
      [&] { device.wait(Queue::kUpload, event); },
      [&] { device.wait_for(event); },
      [&] { device.synchronize(); },
      [&] { ops.sample(slot, {}); },
      [&] { ops.experts(tasks, 1, slot, slot, slot, Phase::kDecode); },
      [&] { ops.add_experts(tasks, {}, 1, slot, slot, slot, slot, Phase::kPrefill); },
      [&] { ops.route({.experts = 8, .top_k = 1}, slot, {}, forced, {}); },
  };
  step({0, 1}, 0, one);
  for (const auto& call : refused) EXPECT_THROW(step({2, 3}, 0, one, call), CudaError);
  EXPECT_EQ(cached(one, 0), expected(0));  // a recording that is dropped has not run
  EXPECT_EQ(device.counts().ops, 3);
  step({3, 4}, 0, one);
  step({1, 2}, 0, one);
  EXPECT_EQ(cached(one, 0), expected(1));
  EXPECT_EQ(device.counts().replayed, 1);
}

TEST_F(EmulatedSegments, OtherThreadsMayCopyWhileOneRecords) {
  const float* from = staged(values);
  step({0, 1}, 0, one);
  step({2, 3}, 0, one, [&] {
    std::thread([&] {
      copy_in(from, slot);
      EXPECT_THROW(device.upload(from, slot.data, 32), CudaError);
    }).join();
  });
  EXPECT_EQ(cached(one, 0), expected(2));
  device.synchronize();
  EXPECT_EQ(room.get(slot), values);
}

TEST(EmulatedExperts, AreThoseThatWereToldLast) {
  EmulatedOps ops({.routed_experts = true});
  Room room(ops.device());
  const Matrix x = room.matrix(1, 8, 1);
  const Matrix hidden = room.matrix(1, 4);
  const Matrix routed = room.matrix(1, 8);
  const Matrix y = room.matrix(1, 8);
  const Matrix logits = room.matrix(1, 1, 2);
  const RouterSpec spec{.experts = 1, .top_k = 1};
  const Routing routing{
      room.array<std::int32_t>(1), room.array<std::int32_t>(1), room.array<float>(1), {}};
  const auto expert = [&](std::uint32_t seed) -> ExpertView {
    return {room.weight(WeightFormat::kF32, 4, 8, seed),
            room.weight(WeightFormat::kF32, 4, 8, seed + 1),
            room.weight(WeightFormat::kF32, 8, 4, seed + 2)};
  };
  const ExpertView before = expert(10);
  const ExpertView after = expert(20);
  std::vector<ExpertView> experts{before};
  const auto step = [&] {
    ops.segment({0, {}, {}}, [&] {
      ops.zero(y);
      ops.route(spec, logits, {}, {}, routing);
      ops.routed_experts(experts, routing, 1, x, hidden, routed, y, nullptr);
    });
    return room.get(y);
  };
  const auto expected = [&](const ExpertView& of) {
    const std::vector<std::int32_t> pairs{0};
    const std::vector<ExpertTask> tasks{{&of, pairs}};
    ops.zero(y);
    ops.experts(tasks, 1, x, hidden, routed, Phase::kDecode);
    ops.add(routed, y);  // the only expert's weight is 1
    return room.get(y);
  };
  ops.prepare_experts(experts);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(step(), expected(before));
  experts[0] = after;
  EXPECT_EQ(step(), expected(before));
  ops.prepare_experts(experts);
  EXPECT_EQ(step(), expected(after));
  EXPECT_NE(expected(before), expected(after));
  EXPECT_EQ(ops.emulated()->counts().replayed, 3);
}

TEST_F(EmulatedSegments, BodiesThatAreNotTheSegmentAreErrors) {
  const std::vector<std::int32_t> ids{1};
  EXPECT_THROW(step({0, 1}, 0, one, [&] { ops.embed(table, ids, slot); }), std::logic_error);
  EXPECT_THROW(step({0, 1}, 0, one, [&] { ops.segment({8, ids, {}}, [] {}); }), std::logic_error);
  const std::vector<SequenceRows> batch{{0, 1, 0, {}}};
  EXPECT_THROW(step({0, 1}, 0, one, [&] { ops.kv_append(batch, slot); }), std::logic_error);
  device.synchronize();
}

TEST_F(EmulatedSegments, FailuresInReplaysSurface) {
  for (int i = 0; i < 3; ++i) step({0, 1}, 0, one);
  device.fail_op(2);
  step({2, 3}, 0, one);
  EXPECT_THROW(device.synchronize(), CudaError);
  device.clear_error();
  EXPECT_EQ(cached(one, 0), expected(0));
}

}  // namespace
}  // namespace dsfp4::ops::testing
