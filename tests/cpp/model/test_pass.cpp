#include <memory>
#include <optional>
#include <vector>

#include <gtest/gtest.h>

#include "checkpoint/config.h"
#include "checkpoint/tiny_checkpoint.h"
#include "engine/kv_cache.h"
#include "engine/loader.h"
#include "model/pass.h"
#include "model/spec.h"
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

// A model of which nothing but norms and routers is in memory: dense layers and experts are read.
class PassTest : public ::testing::TestWithParam<dsfp4::testing::TinyKind> {
 protected:
  PassTest() {
    dsfp4::testing::make_tiny_checkpoint(GetParam(), kModelLayers).write(folder_.path());
    const checkpoint::ModelConfig config = checkpoint::read_config(folder_.path());
    engine::LoadWeightsOptions options;
    options.plan = [](const engine::WeightSizes&) {
      residency::Plan plan;
      plan.tiered = true;
      plan.streamed.assign(kModelLayers, true);
      return plan;
    };
    loaded_.emplace(engine::load_weights(folder_.path(), config, ops_->device(), options));
    const ModelSpec spec = make_spec(config);
    residency::ExpertStore::Options store;
    store.layers = spec.moe_layers();
    store.first_layer = spec.dense_layers;
    store.experts = spec.router.experts;
    store.slots = 3;
    store.cache_slots = 1;
    store_ = std::make_unique<residency::ExpertStore>(
        store, std::move(loaded_->images), *loaded_->reader,
        residency::make_policy("lru", store.layers, store.experts));
    std::vector<residency::RouterView> routers;
    for (std::int64_t layer = spec.dense_layers; layer < spec.layers; ++layer) {
      const LayerWeights& weights = loaded_->weights.layers[static_cast<std::size_t>(layer)];
      const DeviceSpan<const float> bias = weights.e_score_correction_bias;
      const float* const values = ops_->device().on_host(bias.data);
      routers.push_back({weights.gate, bias, {values, values + bias.size}});
    }
    experts_.emplace(*ops_, *store_, spec.router, std::move(routers), spec.dense_layers,
                     spec.hidden_size, spec.moe_intermediate_size, 64, nullptr, nullptr);
    stream_ =
        std::make_unique<residency::LayerStream>(std::move(loaded_->streamed), 2, *loaded_->reader,
                                                 residency::LayerStream::Check(), nullptr);
    decoder_.emplace(spec, loaded_->weights, *ops_, *experts_, stream_.get(), nullptr, kFormat);
    cache_.emplace(1000, spec.layers, kv_layer_bytes(spec, kFormat), kFormat);
  }

  // A step of its own sequence, with an arena of its own.
  class Run {
   public:
    Run(PassTest& test, Ids ids, Phase phase)
        : sequence_(*test.cache_),
          ids_(std::move(ids)),
          part_(sequence_.next_rows(0, std::ssize(ids_))),
          arena_(scratch_bytes(test.decoder_->spec(), kMostRows, Phase::kPrefill) +
                     scratch_bytes(test.decoder_->spec(), kMostRows, Phase::kDecode),
                 "the scratch"),
          routings_(test.ops_->device(), kMostRows, test.decoder_->spec().router,
                    test.decoder_->spec().hidden_size) {
      Batch batch;
      batch.phase = phase;
      batch.ids = ids_;
      batch.sequences = {&part_, 1};
      pass_.emplace(*test.decoder_, batch, arena_, routings_);
    }
    Pass& pass() { return *pass_; }
    Values finish() {
      while (!pass_->done()) pass_->advance();
      const ops::Matrix hidden = pass_->hidden();
      const float* const values = ops::host_device().on_host(hidden.data);
      return {values, values + hidden.rows * hidden.cols};
    }
    std::size_t leave() {
      pass_.reset();
      return arena_.used();
    }

   private:
    Sequence sequence_;
    Ids ids_;
    ops::SequenceRows part_;
    memory::Arena arena_;
    ops::RoutingReader routings_;
    std::optional<Pass> pass_;
  };

  static constexpr ops::KvFormat kFormat = ops::KvFormat::kBf16;
  // A prompt of the many-token kernels, and one token of the few-token ones.
  static Ids prompt() { return {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4}; }
  Values alone(const Ids& ids, Phase phase) { return Run(*this, ids, phase).finish(); }

  dsfp4::testing::ScratchFolder folder_;
  std::unique_ptr<ops::Ops> ops_ = ops::make_cpu_ops(1);
  std::optional<engine::LoadedWeights> loaded_;
  std::unique_ptr<residency::ExpertStore> store_;
  std::optional<residency::TieredExperts> experts_;
  std::unique_ptr<residency::LayerStream> stream_;
  std::optional<Decoder> decoder_;
  std::optional<KvCache> cache_;
};

TEST_P(PassTest, TwoThatTakeTurnsGiveTheBitsOfOneAfterTheOther) {
  for (const Phase phase : {Phase::kPrefill, Phase::kDecode}) {
    const Ids ids = phase == Phase::kPrefill ? Ids{7, 7, 1} : Ids{7};
    const Values first = alone(prompt(), Phase::kPrefill);
    const Values second = alone(ids, phase);
    ASSERT_NE(first, second);
    Run a(*this, prompt(), Phase::kPrefill);
    Run b(*this, ids, phase);
    while (!a.pass().done() || !b.pass().done()) {
      a.pass().advance();
      b.pass().advance();
    }
    EXPECT_EQ(a.finish(), first);
    EXPECT_EQ(b.finish(), second);
  }
  EXPECT_TRUE(store_->is_consistent());
}

// Left after every piece: for good, or until another pass has gone all its way.
TEST_P(PassTest, AnotherGoesOnWhereverOneIsLeft) {
  const Values first = alone(prompt(), Phase::kPrefill);
  const Values second = alone({7}, Phase::kDecode);
  bool done = false;
  for (int pieces = 0; !done; ++pieces) {
    ASSERT_LT(pieces, 1000);
    Run a(*this, prompt(), Phase::kPrefill);
    for (int i = 0; i < pieces; ++i) a.pass().advance();
    done = a.pass().done();
    Run b(*this, {7}, Phase::kDecode);
    EXPECT_EQ(b.finish(), second) << pieces;
    if (pieces % 2 == 0) {
      EXPECT_EQ(a.finish(), first) << pieces;
    }
    EXPECT_EQ(a.leave(), 0u);
    EXPECT_TRUE(store_->is_consistent());
    if (pieces % 2 == 1) {
      EXPECT_EQ(alone(prompt(), Phase::kPrefill), first) << pieces;
    }
  }
}

TEST_P(PassTest, OneIsLeftInTheMidstOfTurns) {
  const Values second = alone({7, 7, 1}, Phase::kPrefill);
  bool done = false;
  for (int pieces = 0; !done; ++pieces) {
    ASSERT_LT(pieces, 1000);
    Run b(*this, {7, 7, 1}, Phase::kPrefill);
    {
      Run a(*this, prompt(), Phase::kPrefill);
      for (int i = 0; i < pieces; ++i) {
        a.pass().advance();
        b.pass().advance();
      }
      done = a.pass().done();
    }
    EXPECT_EQ(b.finish(), second) << pieces;
    EXPECT_EQ(b.leave(), 0u);
    EXPECT_TRUE(store_->is_consistent());
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, PassTest, ::testing::ValuesIn(dsfp4::testing::kTinyKinds));

}  // namespace
}  // namespace dsfp4::model
