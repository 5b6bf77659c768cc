// Memory that ops on a GPU take, counted without one.
#include <cstdint>
#include <vector>

#include <gtest/gtest.h>

#include "ops/cuda/workspaces.h"
#include "ops/cuda_backend.h"
#include "ops/cuda_memory.h"
#include "ops/fake_cuda.h"
#include "ops/raw.h"

namespace dsfp4::ops {
namespace {

constexpr std::int64_t kHidden = 7168;  // R1's
constexpr std::int64_t kIntermediate = 2048;

std::vector<ExpertView> r1_experts() {
  ExpertView expert;
  expert.gate_proj.rows = expert.up_proj.rows = expert.down_proj.cols = kIntermediate;
  expert.gate_proj.cols = expert.up_proj.cols = expert.down_proj.rows = kHidden;
  return std::vector<ExpertView>(256, expert);
}

// Each pair that is added has its x and its hidden values in BF16.
TEST(CudaMemory, IsWhatAPromptNeedsThatAddsItsExpertsAtOnce) {
  const std::vector<ExpertView> experts = r1_experts();
  Ops::Largest largest;
  largest.top_k = 8;
  largest.experts = experts;
  const auto workspace = [&](std::int64_t rows) {
    largest.rows = rows;
    return cuda_step_memory(largest).workspace;
  };
  const auto pairs = static_cast<std::uint64_t>(added_pairs(32768, 8));
  EXPECT_GE(workspace(32768), pairs * 2 * (kHidden + kIntermediate));
  EXPECT_LE(workspace(32768), pairs * (2 * (kHidden + kIntermediate) + 16) + (1u << 20));
  EXPECT_GE(workspace(16), 16u * 2 * (kHidden + 8 * kIntermediate));  // results may be kept
}

TEST(CudaMemory, OfDenseWeightsIsThatOfTheRowsThatPassThemTogether) {
  Ops::Largest largest;
  largest.rows = 32768;
  largest.dense_rows = 4096;
  largest.width = 18432;
  EXPECT_EQ(cuda_step_memory(largest).workspace, 4096u * 18432 * 2);
}

// 128 heads of DeepSeek's geometry at 32768 tokens: 160 Mi values expanded at once, in BF16.
TEST(CudaMemory, OfAttentionIsBounded) {
  Ops::Largest largest;
  largest.mla = {.heads = 128,
                 .kv_lora_rank = 512,
                 .qk_nope_head_dim = 128,
                 .qk_rope_head_dim = 64,
                 .v_head_dim = 128};
  largest.context = 32768;
  const std::uint64_t latents = 32768u * (512 + 64) * 2;
  EXPECT_EQ(cuda_step_memory(largest).workspace, (std::uint64_t{160} << 20) * 2 + latents);
}

// A GPU with more multiprocessors than parts are made for takes no more.
TEST(CudaMemory, OfLatentAttentionHoldsForAnyGpu) {
  MlaShape shape;
  shape.heads = 128;
  shape.kv_lora_rank = 512;
  for (const std::int64_t length : {1, 64, 4096, 32768}) {
    const std::size_t bytes = cuda::latent_workspace(shape, 1, length);
    for (const std::int64_t multiprocessors : {20, 132, 170, 256}) {
      cuda::Carver carver(nullptr);
      cuda::LatentParts::carve(carver, shape, 1,
                               cuda::latent_splits(shape, 1, length, multiprocessors));
      EXPECT_LE(carver.used(), bytes) << length << " " << multiprocessors;
    }
  }
}

TEST(CudaMemory, IsWhatABackendSays) {
  using testing::FakeCuda;
  const CudaBackend backend(FakeCuda::plugin(), FakeCuda::kIndex, 0);
  const std::vector<ExpertView> experts = r1_experts();
  Ops::Largest largest;
  largest.rows = 1000;
  largest.dense_rows = 500;
  largest.top_k = 8;
  largest.experts = experts;
  largest.moe_layers = 58;
  EXPECT_EQ(backend.working_bytes(largest), cuda_working_bytes(largest));
  const std::uint64_t with = cuda_working_bytes(largest);
  largest.moe_layers = 0;
  EXPECT_EQ(with - cuda_working_bytes(largest), 58u * 256 * sizeof(raw::ExpertView));
}

}  // namespace
}  // namespace dsfp4::ops
