// Dense weights that are copied for each step, or converted, beside experts in all tiers, at random
// settings: the bits of the same model in the same formats that lies in memory whole. It takes its
// prompts in other pieces, too.
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "engine/three_tiers_fixture.h"

namespace dsfp4::engine {
namespace {

constexpr std::int64_t kContext = 640;

class LayerSettings : public ThreeTiersFixture {
 protected:
  LayerSettings() {
    auto checkpoint = dsfp4::testing::make_tiny_checkpoint(GetParam(), kModelLayers);
    checkpoint.config.set("max_position_embeddings", dsfp4::testing::JsonNode::number(kContext));
    checkpoint.write(folder_.path());
  }
  std::uint32_t up_to(std::uint32_t most) { return random_() % (most + 1); }
  bool maybe() { return up_to(1) == 1; }

  std::map<std::string, std::string> formats() {
    std::map<std::string, std::string> formats;
    if (up_to(2) == 0) return formats;
    const std::vector<std::string> all = {"keep", "fp8", "nvfp4"};
    for (const char* role : {"o_proj", "shared_experts", "mlp"}) formats[role] = all[up_to(2)];
    for (const char* role : {"attention", "lm_head"}) formats[role] = all[up_to(1)];
    return formats;
  }
  LoadOptions settings() {
    LoadOptions options = load_options();
    options.max_context = kContext;
    options.quantization = formats();
    options.strategy.max_experts = up_to(9);
    if (maybe()) options.strategy.cpu_cache_size = up_to(4) * 20e3 * 1e-9;
    options.strategy.max_gpu_layers = up_to(kModelLayers);
    if (maybe()) {  // as many as leave three to be streamed
      options.strategy.min_layers = std::min<std::int64_t>(*options.strategy.max_gpu_layers, 1);
    }
    if (maybe()) options.memory.prefetch_layers = std::vector{0, 1, 2, 16}[up_to(3)];
    options.memory.cpu_share = 0.0;
    return options;
  }
  Ids ids(std::size_t count, std::int64_t vocab_size) {
    Ids ids(count);
    for (std::int32_t& id : ids) {
      id = static_cast<std::int32_t>(up_to(static_cast<std::uint32_t>(vocab_size - 1)));
    }
    return ids;
  }
  static Says answers(Engine& engine, const Ids& prompt, const Ids& steps) {
    const auto logits_of = [&](const Ids& ids, bool decode) {
      Floats logits(ids.size() * static_cast<std::size_t>(engine.spec().vocab_size));
      ForwardOptions forward;
      forward.decode = decode;
      engine.forward(ids, logits, forward);
      return logits;
    };
    GenerateOptions generate;
    generate.max_tokens = 3;
    generate.stop_ids.emplace();
    return {logits_of(prompt, false), logits_of(steps, true),
            engine.generate(prompt, generate, {}).tokens};
  }

  std::mt19937 random_{23};
};

TEST_P(LayerSettings, AnyGivesTheBitsOfAModelThatLiesInMemory) {
  const int count = std::getenv("DSFP4_FULL") != nullptr ? 67 : 7;  // of each kind
  const std::vector<std::size_t> lengths = {1, 2, 16, 17, 64, 65, 256, 257, 513, 600};
  bool streamed = false;
  for (int n = 0; n < count; ++n) {
    const LoadOptions options = settings();
    LoadOptions in_memory = load_options();
    in_memory.max_context = kContext;
    in_memory.quantization = options.quantization;
    Engine right(folder_.path(), in_memory);
    ASSERT_FALSE(right.stats().tiered);
    ops::testing::EmulatedOptions device = as_a_gpu();
    // With little memory prompts are cut into shorter pieces.
    if (maybe()) device.memory_limit = least_vram(options) + kRounding + up_to(100'000);
    if (maybe()) device.copy_bytes_per_second = 1e8;
    const auto engine = load(options, device);
    streamed = streamed || engine->stats().streamed_layers > 0;
    for (int round = 0; round < 3; ++round) {
      engine->set_compute_streams({up_to(2) > 0, up_to(2) > 0, up_to(2) > 0});
      const std::int64_t vocab_size = right.spec().vocab_size;
      const Ids prompt =
          ids(lengths[up_to(static_cast<std::uint32_t>(lengths.size() - 1))], vocab_size);
      const Ids steps = ids(1 + up_to(4), vocab_size);
      EXPECT_TRUE(answers(*engine, prompt, steps) == answers(right, prompt, steps))
          << n << ", " << prompt.size() << " tokens";
    }
  }
  EXPECT_TRUE(streamed);
}

INSTANTIATE_TEST_SUITE_P(Kinds, LayerSettings, ::testing::ValuesIn(dsfp4::testing::kTinyKinds));

}  // namespace
}  // namespace dsfp4::engine
