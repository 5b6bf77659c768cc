#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "checkpoint/config.h"
#include "checkpoint/tiny_checkpoint.h"
#include "emulated/emulated_ops.h"
#include "engine/kv_cache.h"
#include "engine/loader.h"
#include "model/pass.h"
#include "model/spec.h"
#include "residency/device_experts.h"
#include "residency/device_layers.h"
#include "residency/device_tier.h"
#include "residency/expert_store.h"
#include "residency/layer_stream.h"
#include "residency/tiered_experts.h"

namespace dsfp4::model {
namespace {

using engine::KvCache;
using engine::Sequence;
using Ids = std::vector<std::int32_t>;
using Values = std::vector<float>;

constexpr std::int64_t kModelLayers = 4;
constexpr std::int64_t kMostRows = 24;
constexpr std::int64_t kFewRows = 7;  // of a layer's dense part: several pieces for a prompt

enum class Memory { kRam, kRamAndVram, kLayersInRam };

// All layers are streamed: from the files, or from RAM to two buffers of a device.
residency::Plan streaming_plan(const engine::WeightSizes& sizes, Memory memory) {
  residency::Plan plan;
  plan.tiered = true;
  plan.embedding_in_ram = memory != Memory::kRam;
  if (memory == Memory::kRamAndVram) return plan;
  plan.streamed.assign(kModelLayers, true);
  if (memory == Memory::kRam) return plan;
  plan.layer_buffers = 2;
  for (const std::uint64_t bytes : sizes.layer_bytes) plan.staged_bytes += bytes;
  plan.layer_buffer_bytes = std::ranges::max(sizes.layer_bytes);
  return plan;
}

// A model of which nothing but norms and routers is in memory: dense layers and experts are read.
// Or one whose dense layers are on a device, or are copied there from RAM, and whose experts are
// there, in RAM and in files.
class PassTest : public ::testing::TestWithParam<std::tuple<dsfp4::testing::TinyKind, Memory>> {
 protected:
  PassTest() {
    const auto [kind, memory] = GetParam();
    const bool on_device = memory != Memory::kRam;
    ops_ = on_device ? std::make_unique<ops::testing::EmulatedOps>() : ops::make_cpu_ops(1);
    dsfp4::testing::make_tiny_checkpoint(kind, kModelLayers).write(folder_.path());
    const checkpoint::ModelConfig config = checkpoint::read_config(folder_.path());
    engine::LoadWeightsOptions options;
    options.plan = [memory](const engine::WeightSizes& sizes) {
      return streaming_plan(sizes, memory);
    };
    loaded_.emplace(engine::load_weights(folder_.path(), config, ops_->device(), options));
    const ModelSpec spec = make_spec(config);
    residency::ExpertStore::Options store;
    store.layers = spec.moe_layers();
    store.first_layer = spec.dense_layers;
    store.experts = spec.router.experts;
    store.slots = 3;
    store.cache_slots = 1;
    store.memory = &ops_->device().staging();
    store_ = std::make_unique<residency::ExpertStore>(
        store, std::move(loaded_->images), *loaded_->reader,
        residency::make_policy("lru", store.layers, store.experts));
    std::vector<residency::RouterView> routers;
    for (std::int64_t layer = spec.dense_layers; layer < spec.layers; ++layer) {
      const LayerWeights& weights = loaded_->weights.layers[static_cast<std::size_t>(layer)];
      const DeviceSpan<const float> bias = weights.e_score_correction_bias;
      std::vector<float> on_host(bias.size);
      ops_->device().download(bias.data, on_host.data(), bias.size_bytes());
      routers.push_back({weights.gate, bias, std::move(on_host)});
    }
    if (on_device) add_device(spec);
    if (memory == Memory::kLayersInRam) {
      stream_ =
          std::make_unique<residency::DeviceLayers>(std::move(loaded_->staged), 2, ops_->device());
    } else if (memory == Memory::kRam) {
      stream_ = std::make_unique<residency::LayerStream>(std::move(loaded_->streamed), 2,
                                                         *loaded_->reader,
                                                         residency::LayerStream::Check(), nullptr);
    }
    experts_.emplace(*ops_, *store_, spec.router, std::move(routers), spec.dense_layers,
                     spec.hidden_size, spec.moe_intermediate_size, kMostRows, tier_.get(), nullptr);
    if (on_device) experts_->configure({.prefetch_layers = 0, .host_share = 0.5});
    decoder_.emplace(spec, loaded_->weights, *ops_, *experts_, stream_.get(), embedding_.get(),
                     kFormat);
    memory::MemorySource& memory_of_ops = ops_->device().memory();
    cache_.emplace(1000, spec.layers, kv_layer_bytes(spec, kFormat), kFormat, memory_of_ops);
    const std::size_t bytes = scratch_bytes(spec, kMostRows, Phase::kPrefill) +
                              scratch_bytes(spec, kMostRows, Phase::kDecode);
    first_arena_.emplace(bytes, "the scratch", memory_of_ops);
    second_arena_.emplace(bytes, "the scratch", memory_of_ops);
  }
  ~PassTest() override { ops_->device().synchronize(); }

  // Few slots, so that experts go and come again.
  void add_device(const ModelSpec& spec) {
    host_ = ops::make_reference_ops(1);
    device_experts_ = std::make_unique<residency::DeviceExperts>(
        ops_->device(), loaded_->sizes.device_slot_bytes, 4, 2,
        static_cast<std::uint64_t>(spec.moe_layers() * spec.router.experts),
        [this](std::span<const residency::ExpertKey> keys, std::span<float> worth) {
          store_->worth(keys, worth);
        });
    tier_ = std::make_unique<residency::DeviceTier>(
        *ops_, *host_, *device_experts_, *store_,
        residency::DeviceTier::Shape{spec.router.top_k, spec.hidden_size,
                                     spec.moe_intermediate_size});
    embedding_ = std::make_unique<HostEmbedding>(*host_, spec.hidden_size);
  }
  void expect_nothing_held() {
    if (tier_ != nullptr) {
      tier_->settle();
      EXPECT_TRUE(device_experts_->is_consistent());
    }
    EXPECT_TRUE(store_->is_consistent());
  }

  // A step of its own sequence. Of two that take turns each has an arena, at the same place every
  // time, as steps may be recorded.
  class Run {
   public:
    // `own`: ids of a sequence before the others', which are then a second one; 0: one sequence.
    Run(PassTest& test, Ids ids, Phase phase, memory::Arena& arena,
        std::int64_t dense_rows = kFewRows, std::int64_t own = 0)
        : device_(test.ops_->device()),
          before_(*test.cache_),
          sequence_(*test.cache_),
          ids_(std::move(ids)),
          arena_(arena),
          routings_(test.ops_->device(), kMostRows, test.decoder_->spec().router,
                    test.decoder_->spec().hidden_size) {
      Batch batch;
      batch.phase = phase;
      batch.ids = ids_;
      if (own > 0) parts_.push_back(before_.next_rows(0, own));
      parts_.push_back(sequence_.next_rows(own, std::ssize(ids_) - own));
      batch.sequences = parts_;
      batch.dense_rows = dense_rows;
      pass_.emplace(*test.decoder_, batch, arena_, routings_);
    }
    Pass& pass() { return *pass_; }
    Values finish() {
      while (!pass_->done()) pass_->advance();
      const ops::Matrix hidden = pass_->hidden();
      Values values(static_cast<std::size_t>(hidden.rows * hidden.cols));
      device_.download(hidden.data, values.data(), values.size() * sizeof(float));
      return values;
    }
    std::size_t leave() {
      pass_.reset();
      return arena_.used();
    }

   private:
    ops::Device& device_;
    Sequence before_, sequence_;
    Ids ids_;
    std::vector<ops::SequenceRows> parts_;
    memory::Arena& arena_;
    ops::RoutingReader routings_;
    std::optional<Pass> pass_;
  };

  static constexpr ops::KvFormat kFormat = ops::KvFormat::kBf16;
  // A prompt of the many-token kernels, and one token of the few-token ones.
  static Ids prompt() { return {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4}; }
  Run first(const Ids& ids, Phase phase) { return {*this, ids, phase, *first_arena_}; }
  Run second(const Ids& ids, Phase phase) { return {*this, ids, phase, *second_arena_}; }

  dsfp4::testing::ScratchFolder folder_;
  std::unique_ptr<ops::Ops> ops_;
  std::optional<engine::LoadedWeights> loaded_;
  std::unique_ptr<residency::ExpertStore> store_;
  // Of a model on a device.
  std::unique_ptr<ops::Ops> host_;
  std::unique_ptr<residency::DeviceExperts> device_experts_;
  std::unique_ptr<residency::DeviceTier> tier_;
  std::unique_ptr<HostEmbedding> embedding_;
  std::optional<residency::TieredExperts> experts_;
  std::unique_ptr<residency::DenseLayers> stream_;
  std::optional<Decoder> decoder_;
  std::optional<KvCache> cache_;
  std::optional<memory::Arena> first_arena_, second_arena_;
};

TEST_P(PassTest, TwoThatTakeTurnsGiveTheBitsOfOneAfterTheOther) {
  struct Turns {
    Ids first;
    Phase first_phase;
    Ids second;
    Phase second_phase;
  };
  for (const Turns& turns : {Turns{prompt(), Phase::kPrefill, {7, 7, 1}, Phase::kPrefill},
                             Turns{prompt(), Phase::kPrefill, {7}, Phase::kDecode},
                             Turns{{3, 1}, Phase::kDecode, {7}, Phase::kDecode}}) {
    const Values one = first(turns.first, turns.first_phase).finish();
    const Values other = second(turns.second, turns.second_phase).finish();
    ASSERT_NE(one, other);
    for (int round = 0; round < 3; ++round) {
      Run a = first(turns.first, turns.first_phase);
      Run b = second(turns.second, turns.second_phase);
      while (!a.pass().done() || !b.pass().done()) {
        a.pass().advance();
        b.pass().advance();
      }
      EXPECT_EQ(a.finish(), one);
      EXPECT_EQ(b.finish(), other);
    }
  }
  expect_nothing_held();
  if (tier_ == nullptr) return;
  EXPECT_GT(tier_->stats().host_bytes, 0u);
  EXPECT_GT(device_experts_->stats().hits, 0u);
  EXPECT_GT(device_experts_->stats().brought, 0u);
}

// Of one sequence, and of two that meet within a piece.
TEST_P(PassTest, PiecesOfRowsChangeNoBit) {
  for (const std::int64_t own : {0, 9}) {
    const Values whole =
        Run(*this, prompt(), Phase::kPrefill, *first_arena_, kDenseRows, own).finish();
    for (const std::int64_t rows : {1, 3, 7, 10, 19, 20}) {
      Run run(*this, prompt(), Phase::kPrefill, *first_arena_, rows, own);
      EXPECT_EQ(run.finish(), whole) << rows << " rows, " << own;
    }
  }
  expect_nothing_held();
}

TEST_P(PassTest, ALayersDensePartIsSeveralPieces) {
  const auto pieces = [&](std::int64_t rows) {
    Run run(*this, prompt(), Phase::kPrefill, *first_arena_, rows);
    int count = 0;
    for (; !run.pass().done(); ++count) run.pass().advance();
    return count;
  };
  // 19 more of each layer, but groups of experts are as large as reads are early.
  EXPECT_GE(pieces(1), pieces(20) + 10 * kModelLayers);
}

// Left after every piece: for good, or until another pass has gone all its way.
TEST_P(PassTest, AnotherGoesOnWhereverOneIsLeft) {
  const Values other = second({7}, Phase::kDecode).finish();
  for (const auto& [ids, phase] :
       {std::pair(prompt(), Phase::kPrefill), std::pair(Ids{3, 1}, Phase::kDecode)}) {
    const Values one = first(ids, phase).finish();
    bool done = false;
    for (int pieces = 0; !done; ++pieces) {
      ASSERT_LT(pieces, 1000);
      Run a = first(ids, phase);
      for (int i = 0; i < pieces; ++i) a.pass().advance();
      done = a.pass().done();
      Run b = second({7}, Phase::kDecode);
      EXPECT_EQ(b.finish(), other) << pieces;
      if (pieces % 2 == 0) {
        EXPECT_EQ(a.finish(), one) << pieces;
      }
      EXPECT_EQ(a.leave(), 0u);
      expect_nothing_held();
      if (pieces % 2 == 1) {
        EXPECT_EQ(first(ids, phase).finish(), one) << pieces;
      }
    }
  }
}

TEST_P(PassTest, OneIsLeftInTheMidstOfTurns) {
  const Values other = second({7, 7, 1}, Phase::kPrefill).finish();
  bool done = false;
  for (int pieces = 0; !done; ++pieces) {
    ASSERT_LT(pieces, 1000);
    Run b = second({7, 7, 1}, Phase::kPrefill);
    {
      Run a = first(prompt(), Phase::kPrefill);
      for (int i = 0; i < pieces; ++i) {
        a.pass().advance();
        b.pass().advance();
      }
      done = a.pass().done();
    }
    EXPECT_EQ(b.finish(), other) << pieces;
    EXPECT_EQ(b.leave(), 0u);
    expect_nothing_held();
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, PassTest,
                         ::testing::Combine(::testing::ValuesIn(dsfp4::testing::kTinyKinds),
                                            ::testing::Values(Memory::kRam, Memory::kRamAndVram,
                                                              Memory::kLayersInRam)));

}  // namespace
}  // namespace dsfp4::model
