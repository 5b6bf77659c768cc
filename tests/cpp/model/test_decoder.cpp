#include <gtest/gtest.h>

#include "checkpoint/config.h"
#include "dsfp4/error.h"
#include "engine/engine.h"
#include "model/decoder.h"
#include "model/pass.h"
#include "model/spec.h"
#include "ops/backend.h"
#include "ops/cuda_backend.h"
#include "ops/fake_cuda.h"
#include "residency/resident_experts.h"

namespace dsfp4::model {
namespace {

checkpoint::ModelConfig r1() {
  checkpoint::ModelConfig config;
  config.model_type = "deepseek_v3";
  config.vocab_size = 129280;
  config.hidden_size = 7168;
  config.num_hidden_layers = 61;
  config.first_k_dense_replace = 3;
  config.num_attention_heads = 128;
  config.q_lora_rank = 1536;
  config.kv_lora_rank = 512;
  config.qk_nope_head_dim = 128;
  config.qk_rope_head_dim = 64;
  config.v_head_dim = 128;
  config.intermediate_size = 18432;
  config.moe_intermediate_size = 2048;
  config.n_routed_experts = 256;
  config.n_shared_experts = 1;
  config.num_experts_per_tok = 8;
  config.n_group = 8;
  config.topk_group = 4;
  config.scoring_func = checkpoint::Scoring::kSigmoid;
  config.topk_method = checkpoint::TopkMethod::kNoauxTc;
  return config;
}

// A prompt that is cut into chunks reads most experts once for each of them.
TEST(Decoder, APromptOf4096TokensOfR1IsOneChunk) {
  const checkpoint::ModelConfig config = r1();
  const auto backend = ops::make_reference_backend(1);
  residency::ResidentExperts experts(*backend, config.hidden_size, config.moe_intermediate_size,
                                     {});
  const ModelWeights none;
  const Decoder decoder(make_spec(config), none, *backend, experts, nullptr, ops::KvFormat::kBf16);
  const std::size_t bytes =
      decoder.scratch_bytes(engine::kLongestPrefillChunk, ops::Phase::kPrefill);
  EXPECT_LE(bytes, engine::kActivationBytes);
  EXPECT_GT(bytes, engine::kActivationBytes / 4);  // it is counted
}

// A stream that is still recorded refuses whatever comes next, until it is closed.
TEST(Decoder, ARecordingEndsWithTheStepThatFailed) {
  using ops::testing::FakeCuda;
  checkpoint::ModelConfig config = r1();
  config.hidden_size = 8;
  ops::CudaBackend backend(FakeCuda::plugin(), FakeCuda::kIndex, 0);
  FakeCuda& fake = FakeCuda::state();
  fake.embeds = false;
  residency::ResidentExperts experts(backend, config.hidden_size, config.moe_intermediate_size, {});
  ModelWeights weights;
  weights.embed_tokens.rows = 1;
  const Decoder decoder(make_spec(config), weights, backend, experts, nullptr,
                        ops::KvFormat::kBf16);
  memory::Arena arena(std::size_t{1} << 20, "the test", backend.memory());
  const std::int32_t id = 0;
  std::byte* const block = nullptr;
  ops::SequenceRows rows;
  rows.rows = 1;
  rows.kv.blocks = {&block, 1};
  Batch batch;
  batch.phase = ops::Phase::kDecode;
  batch.ids = {&id, 1};
  batch.sequences = {&rows, 1};
  for (int step = 0; step < 3; ++step) {  // the first one is not recorded yet
    Pass pass(decoder, batch, arena);
    EXPECT_THROW(pass.advance(), CudaError);
    EXPECT_EQ(fake.recorded, step);
    EXPECT_EQ(fake.recordings, 0);
  }
}

}  // namespace
}  // namespace dsfp4::model
