#include <gtest/gtest.h>

#include "checkpoint/config.h"
#include "checkpoint/published.h"
#include "emulated/emulated_ops.h"
#include "engine/model_bytes.h"
#include "model/decoder.h"
#include "model/spec.h"
#include "ops/host_routing.h"
#include "ops/ops.h"
#include "residency/plan.h"

namespace dsfp4::engine {
namespace {

checkpoint::ModelConfig r1() { return checkpoint::published_model("deepseek-r1-fp4").config; }

residency::ModelBytes bytes_with(std::int64_t max_context) {
  const model::ModelSpec spec = model::make_spec(r1());
  const auto backend = ops::make_reference_ops(1);
  return model_bytes({spec, backend_of(*backend), {}, ops::KvFormat::kBf16, max_context},
                     WeightSizes());
}

// Only the residual stream, its normed copy and the choice grow with every row of a prompt.
TEST(ModelBytes, AttentionOfAPromptTakesWhatAPieceOfItTakes) {
  checkpoint::ModelConfig config = r1();
  config.n_routed_experts = 0;
  config.first_k_dense_replace = config.num_hidden_layers;
  const model::ModelSpec spec = model::make_spec(config);
  const auto bytes = [&](std::int64_t rows) {
    return model::scratch_bytes(spec, rows, model::Phase::kPrefill);
  };
  const std::uint64_t a_row = 4 * (2 * 7168 + 64);
  EXPECT_EQ(bytes(4096) - bytes(model::kDenseRows), (4096 - model::kDenseRows) * a_row);
  EXPECT_GT(bytes(model::kDenseRows), 2 * model::kDenseRows * a_row);
}

TEST(ModelBytes, OpsWorkInMemoryForTheRowsThatPassThemTogether) {
  const model::ModelSpec spec = model::make_spec(r1());
  const auto backend = ops::make_reference_ops(1);
  const Running running{spec, backend_of(*backend), {}, ops::KvFormat::kBf16, 163840};
  const ops::Ops::Largest prompt = largest_step(running, WeightSizes(), 32768);
  EXPECT_EQ(prompt.rows, 32768);
  EXPECT_EQ(prompt.dense_rows, model::kDenseRows);
  EXPECT_EQ(prompt.width, 18432);
  EXPECT_EQ(prompt.step_width, 7168);
  EXPECT_EQ(largest_step(running, WeightSizes(), 1000).dense_rows, 1000);
}

// A prompt that is cut into chunks reads most experts once for each of them.
TEST(ModelBytes, APromptOf32768TokensOfR1IsOneChunk) {
  const residency::ModelBytes bytes = bytes_with(163840);
  ASSERT_EQ(bytes.steps.size(), 8u);
  EXPECT_EQ(bytes.steps.front().rows, 256);
  EXPECT_EQ(bytes.steps[4].rows, 4096);
  EXPECT_LE(bytes.steps[4].bytes, residency::kSmallActivationBytes);
  EXPECT_EQ(bytes.steps.back().rows, 32768);
  EXPECT_LE(bytes.steps.back().bytes, residency::kActivationBytes);
  EXPECT_GT(bytes.steps.back().bytes, residency::kActivationBytes / 4);  // it is counted
  EXPECT_EQ(bytes.kv_block, 61u * 64 * 576 * 2);
}

TEST(ModelBytes, NoChunkIsLongerThanTheContext) {
  const auto rows = [](std::int64_t max_context) {
    std::vector<std::int64_t> all;
    for (const auto& step : bytes_with(max_context).steps) all.push_back(step.rows);
    return all;
  };
  EXPECT_EQ(rows(100), (std::vector<std::int64_t>{100}));
  EXPECT_EQ(rows(256), (std::vector<std::int64_t>{256}));
  EXPECT_EQ(rows(1000), (std::vector<std::int64_t>{256, 512, 1000}));
}

TEST(ModelBytes, WhatTheHostComputesIsCountedOnAGpuOnly) {
  const model::ModelSpec spec = model::make_spec(r1());
  ops::testing::EmulatedOps gpu;
  WeightSizes sizes;
  sizes.embedding_bytes = 10;
  sizes.embedding_host_bytes = 20;
  sizes.device_slot_bytes = 30;
  const residency::ModelBytes bytes =
      model_bytes({spec, backend_of(gpu), {}, ops::KvFormat::kBf16, 1000}, sizes);
  EXPECT_EQ(bytes.embedding, 10u);
  EXPECT_EQ(bytes.host_embedding, 20u);
  EXPECT_EQ(bytes.device_slot, 30u);
  // 16 rows of 7168 values and what 8 experts make of each, 7168 values and 2048 between; and 64
  // rows of the embedding. The choice, and a predicted one.
  const std::uint64_t experts = 4 * (16 * (7168 + 8 * (7168 + 2048)) + 64 * 7168);
  for (const residency::ModelBytes::Step& step : bytes.steps) {
    const auto predicted = static_cast<std::uint64_t>(4 * 8 * step.rows);
    EXPECT_EQ(step.host_bytes, experts + ops::routing_bytes(step.rows, spec.router) + predicted);
  }
  EXPECT_EQ(bytes_with(1000).steps.back().host_bytes, 0u);
}

TEST(ModelBytes, TheBufferOfALoadIsForAGpuOrForConversion) {
  const model::ModelSpec spec = model::make_spec(r1());
  const auto in_ram = ops::make_reference_ops(1);
  ops::testing::EmulatedOps gpu;
  const auto buffer = [&](ops::Ops& ops, std::uint64_t conversion) {
    WeightSizes sizes;
    sizes.load_buffer = 100;
    sizes.conversion = conversion;
    return model_bytes({spec, backend_of(ops), {}, ops::KvFormat::kBf16, 1000}, sizes).load_buffer;
  };
  EXPECT_EQ(buffer(*in_ram, 0), 0u);
  EXPECT_EQ(buffer(*in_ram, 7), 107u);
  EXPECT_EQ(buffer(gpu, 0), 100u);
  EXPECT_EQ(buffer(gpu, 7), 107u);
}

// Predicting the next layer's experts takes more than computing such small ones does.
TEST(ModelBytes, ScratchIsEnoughWhereverTheExpertsAre) {
  checkpoint::ModelConfig config = r1();
  config.hidden_size = 8;
  config.moe_intermediate_size = 4;
  config.intermediate_size = 4;
  config.num_experts_per_tok = 1;
  config.num_attention_heads = 1;
  config.q_lora_rank = 4;
  config.kv_lora_rank = 4;
  config.qk_nope_head_dim = 2;
  config.qk_rope_head_dim = 2;
  config.v_head_dim = 2;
  const std::size_t logits = 64 * 256 * sizeof(float);  // of a router, for 64 tokens
  EXPECT_GE(model::scratch_bytes(model::make_spec(config), 64, model::Phase::kPrefill), 2 * logits);
}

}  // namespace
}  // namespace dsfp4::engine
