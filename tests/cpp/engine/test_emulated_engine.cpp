// A whole model on the emulated device: what the host gets of it, and what it must not touch.
#include <cstdint>
#include <memory>
#include <vector>

#include <gtest/gtest.h>

#include "checkpoint/tiny_checkpoint.h"
#include "dsfp4/error.h"
#include "emulated/emulated_ops.h"
#include "engine/engine.h"

namespace dsfp4::engine {
namespace {

using ops::testing::EmulatedDevice;
using ops::testing::EmulatedOps;
using Floats = std::vector<float>;
using Ids = std::vector<std::int32_t>;

constexpr std::int64_t kModelLayers = 4;

// The results of forward().
struct Outcome {
  Floats logits;
  Ids chosen;
  Floats router_logits;
};

class EmulatedEngine : public ::testing::TestWithParam<dsfp4::testing::TinyKind> {
 protected:
  EmulatedEngine() {
    dsfp4::testing::make_tiny_checkpoint(GetParam(), kModelLayers).write(folder_.path());
  }
  static LoadOptions load_options() {
    LoadOptions options;
    options.threads = 1;
    options.max_context = 64;
    options.device = "reference";
    return options;
  }
  std::unique_ptr<Engine> on_reference() const {
    return std::make_unique<Engine>(folder_.path(), load_options());
  }
  // `routed`: the device groups the experts' rows by itself, as a GPU does.
  std::unique_ptr<Engine> emulated(bool routed = true) {
    Machine machine;
    machine.make_ops = [&] {
      auto made =
          std::make_unique<EmulatedOps>(ops::testing::EmulatedOptions{.routed_experts = routed});
      device_ = made->emulated();
      return made;
    };
    return std::make_unique<Engine>(folder_.path(), load_options(), machine);
  }
  static Outcome forward(Engine& engine, const Ids& ids, bool decode, bool choice = true,
                         bool router = true, const Ids& forced = {}) {
    const model::ModelSpec& spec = engine.spec();
    const auto tokens = ids.size() * static_cast<std::size_t>(spec.moe_layers());
    Outcome outcome;
    outcome.logits.resize(ids.size() * static_cast<std::size_t>(spec.vocab_size));
    if (choice) outcome.chosen.assign(tokens * static_cast<std::size_t>(spec.router.top_k), -1);
    if (router) {
      outcome.router_logits.assign(tokens * static_cast<std::size_t>(spec.router.experts), -1e9f);
    }
    ForwardOptions options;
    options.decode = decode;
    options.chosen_experts = outcome.chosen;
    options.router_logits = outcome.router_logits;
    options.forced_experts = forced;
    engine.forward(ids, outcome.logits, options);
    return outcome;
  }

  dsfp4::testing::ScratchFolder folder_;
  std::shared_ptr<EmulatedDevice> device_;
};

Ids ids_of(int count, int from = 3) {
  Ids ids;
  for (int i = 0; i < count; ++i) ids.push_back((from + 7 * i) % 30);
  return ids;
}

TEST_P(EmulatedEngine, ComputesWhatTheReferenceComputes) {
  const auto right = on_reference();
  for (const bool routed : {true, false}) {
    const auto engine = emulated(routed);
    for (const bool decode : {false, true}) {
      for (const int from : {3, 4}) {  // twice, as a step's second run is recorded
        const Outcome want = forward(*right, ids_of(50, from), decode);
        const Outcome got = forward(*engine, ids_of(50, from), decode);
        EXPECT_EQ(got.logits, want.logits) << routed << decode;
        EXPECT_EQ(got.chosen, want.chosen) << routed << decode;
        EXPECT_EQ(got.router_logits, want.router_logits) << routed << decode;
      }
    }
  }
}

// In a step that is recorded as one, nobody would write them.
TEST_P(EmulatedEngine, GivesTheRoutersLogitsOrTheirChoiceAloneInRecordedSteps) {
  const auto right = on_reference();
  const auto engine = emulated();
  const Ids ids = ids_of(9);
  const Outcome want = forward(*right, ids, true);
  for (int run = 0; run < 2; ++run) {
    EXPECT_EQ(forward(*engine, ids, true, false, false).logits, want.logits);
    EXPECT_EQ(forward(*engine, ids, true, false, true).router_logits, want.router_logits);
    EXPECT_EQ(forward(*engine, ids, true, true, false).chosen, want.chosen);
  }
  EXPECT_GT(device_->counts().replayed, 0);
}

TEST_P(EmulatedEngine, UsesExpertsThatAreForced) {
  const auto right = on_reference();
  const auto engine = emulated();
  const Ids ids = ids_of(5);
  const Ids other = forward(*right, ids_of(5, 11), true).chosen;
  for (const bool decode : {false, true}) {
    for (int run = 0; run < 3; ++run) {
      EXPECT_EQ(forward(*engine, ids, decode, true, true, other).logits,
                forward(*right, ids, decode, true, true, other).logits);
    }
  }
}

TEST_P(EmulatedEngine, ADecodeStepIsOneRecordingAndOneWait) {
  const auto engine = emulated();
  GenerateOptions options;
  options.max_tokens = 20;
  options.stop_ids.emplace();
  const Ids prompt = ids_of(3);
  const Ids text = engine->generate(prompt, options, {}).tokens;
  EXPECT_EQ(text, on_reference()->generate(prompt, options, {}).tokens);
  const auto before = device_->counts();
  EXPECT_EQ(engine->generate(prompt, options, {}).tokens, text);
  const auto after = device_->counts();
  EXPECT_EQ(after.replayed - before.replayed, options.max_tokens - 1);
  EXPECT_EQ(after.bodies, before.bodies);
  // A wait for the draw and one for the logits, which the device leaves to the host; the prompt's
  // one for the choice of each MoE layer, as its experts are added in their order.
  const std::int64_t moe_layers = engine->spec().moe_layers();
  EXPECT_EQ(after.host_waits - before.host_waits, 2 * options.max_tokens - 1 + moe_layers);
}

TEST_P(EmulatedEngine, AnErrorOfTheDeviceComesAndTheNextStepIsWhole) {
  const auto engine = emulated();
  const Ids ids = ids_of(6);
  for (const bool decode : {false, true}) {
    const Floats right = forward(*engine, ids, decode).logits;
    for (std::int64_t n = 1; n < 45; n += 7) {
      device_->fail_op(n);
      EXPECT_THROW(forward(*engine, ids, decode), CudaError) << n;
      device_->clear_error();
      EXPECT_EQ(forward(*engine, ids, decode).logits, right) << n;
    }
  }
}

TEST_P(EmulatedEngine, EverythingGoesBack) {
  emulated();
  EXPECT_EQ(device_->memory().used(), 0u);
  EXPECT_EQ(device_->staging().used(), 0u);
  Machine machine;
  for (std::int64_t n = 1; n <= 6; ++n) {
    machine.make_ops = [&] {
      auto made =
          std::make_unique<EmulatedOps>(ops::testing::EmulatedOptions{.routed_experts = true});
      device_ = made->emulated();
      device_->memory().fail_allocation(n);
      return made;
    };
    try {
      const Engine engine(folder_.path(), load_options(), machine);
    } catch (const MemoryLimitError&) {
    }
    EXPECT_EQ(device_->memory().used(), 0u);
    EXPECT_EQ(device_->staging().used(), 0u);
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, EmulatedEngine, ::testing::ValuesIn(dsfp4::testing::kTinyKinds));

}  // namespace
}  // namespace dsfp4::engine
