// Which memory weights are loaded into.
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "checkpoint/config.h"
#include "checkpoint/tiny_checkpoint.h"
#include "emulated/emulated_device.h"
#include "engine/loader.h"
#include "format/weight.h"
#include "memory/source.h"

namespace dsfp4::engine {
namespace {

using dsfp4::testing::TinyKind;
using ops::testing::EmulatedDevice;

class PlacementTest : public ::testing::Test {
 protected:
  // With bytes of its own in each of its matrices.
  void write(TinyKind kind) {
    dsfp4::testing::TinyCheckpoint checkpoint = dsfp4::testing::make_tiny_checkpoint(kind);
    embedding_ = fill(checkpoint, "model.embed_tokens.weight", 1);
    if (kind != TinyKind::kBf16) head_ = fill(checkpoint, "lm_head.weight", 2);
    folder_ = std::make_unique<dsfp4::testing::ScratchFolder>();
    checkpoint.write(folder_->path());
  }

  LoadedWeights load(const residency::Plan& plan) {
    LoadWeightsOptions options;
    options.plan = [&](const WeightSizes&) { return plan; };
    return load_weights(folder_->path(), checkpoint::read_config(folder_->path()), device_,
                        options);
  }

  static residency::Plan tiers() {
    residency::Plan plan;
    plan.tiered = true;
    plan.embedding_in_ram = true;
    return plan;
  }

  std::string on_device(DevicePtr<const std::byte> from, std::size_t bytes) {
    std::string there(bytes, '\0');
    device_.download(from, there.data(), bytes);
    return there;
  }

  std::string embedding_, head_;  // as in the files
  std::unique_ptr<dsfp4::testing::ScratchFolder> folder_;
  EmulatedDevice device_;

 private:
  // Small BF16 values.
  static std::string fill(dsfp4::testing::TinyCheckpoint& checkpoint, const std::string& name,
                          int first) {
    for (dsfp4::testing::TinyShard& shard : checkpoint.shards) {
      dsfp4::testing::JsonNode* tensor = shard.header.find(name);
      if (tensor == nullptr) continue;
      const auto& offsets = tensor->find("data_offsets")->members;
      const std::size_t begin = std::stoul(offsets[0].value.token);
      const std::size_t end = std::stoul(offsets[1].value.token);
      for (std::size_t i = begin; i < end; ++i) {
        shard.data[i] = static_cast<char>((i - begin) % 61 + static_cast<std::size_t>(first));
      }
      return shard.data.substr(begin, end - begin);
    }
    ADD_FAILURE() << "no tensor " << name;
    return "";
  }
};

TEST_F(PlacementTest, TheEmbeddingLiesInRamAndTheHeadOnTheDevice) {
  for (const TinyKind kind : {TinyKind::kNvfp4, TinyKind::kCompressed}) {
    write(kind);
    const LoadedWeights loaded = load(tiers());
    const ops::WeightView& embed = loaded.weights.embed_tokens;
    ASSERT_NE(loaded.host_arena, nullptr);
    EXPECT_EQ(std::memcmp(memory::on_host(memory::host_memory(), embed.data), embedding_.data(),
                          embedding_.size()),
              0);
    EXPECT_THROW(on_device(embed.data, embedding_.size()), std::logic_error);
    device_.clear_error();
    EXPECT_EQ(on_device(loaded.weights.lm_head.data, head_.size()), head_);
    EXPECT_EQ(loaded.host_arena->size(), loaded.sizes.embedding_host_bytes);
    EXPECT_EQ(loaded.arena->size(), loaded.sizes.dense_bytes - loaded.sizes.embedding_bytes);
    EXPECT_EQ(device_.memory().used(), loaded.arena->size());
    EXPECT_EQ(loaded.images.size(), loaded.sizes.experts);
    EXPECT_NE(loaded.reader, nullptr);
  }
}

TEST_F(PlacementTest, WithoutThatPlanEverythingIsOnTheDevice) {
  write(TinyKind::kNvfp4);
  const LoadedWeights loaded = load({});
  EXPECT_EQ(loaded.host_arena, nullptr);
  EXPECT_EQ(on_device(loaded.weights.embed_tokens.data, embedding_.size()), embedding_);
  EXPECT_EQ(on_device(loaded.weights.lm_head.data, head_.size()), head_);
  EXPECT_EQ(loaded.arena->size(), loaded.sizes.dense_bytes + loaded.sizes.expert_bytes);
  EXPECT_TRUE(loaded.images.empty());
}

TEST_F(PlacementTest, AnEmbeddingThatIsTheHeadIsNotCountedByItself) {
  write(TinyKind::kBf16);
  residency::Plan plan = tiers();
  plan.embedding_in_ram = false;
  const LoadedWeights loaded = load(plan);
  EXPECT_EQ(loaded.sizes.embedding_bytes, 0u);
  EXPECT_EQ(loaded.sizes.embedding_host_bytes, 0u);
  EXPECT_EQ(on_device(loaded.weights.lm_head.data, embedding_.size()), embedding_);
}

TEST_F(PlacementTest, ASlotOnTheDeviceHoldsAnExpertsMatricesEachAtItsBoundary) {
  for (const TinyKind kind : dsfp4::testing::kTinyKinds) {
    write(kind);
    const LoadedWeights loaded = load({});
    const ops::ExpertView& expert = loaded.sizes.layer_experts.front();
    std::size_t bytes = 0;
    for (const ops::WeightView& matrix : {expert.gate_proj, expert.up_proj, expert.down_proj}) {
      bytes += memory::Arena::padded(format::data_bytes(matrix.format, matrix.rows, matrix.cols));
      bytes += memory::Arena::padded(format::scale_bytes(matrix.format, matrix.rows, matrix.cols));
    }
    EXPECT_EQ(loaded.sizes.device_slot_bytes, bytes);
    EXPECT_EQ(loaded.sizes.expert_bytes, loaded.sizes.experts * bytes);
  }
}

}  // namespace
}  // namespace dsfp4::engine
