#include <cstdint>
#include <vector>

#include <gtest/gtest.h>

#include "checkpoint/tiny_checkpoint.h"
#include "dsfp4/error.h"
#include "engine/engine.h"

namespace dsfp4::engine {
namespace {

constexpr std::int32_t kPrompt[] = {5, 3, 9};
constexpr std::int64_t kModelLayers = 4;

LoadOptions load_options(bool tiered) {
  LoadOptions options;
  options.threads = 1;
  options.max_context = 16;
  if (tiered) options.strategy.cpu_cache_size = 0.0;
  return options;
}

// A token can take long where experts come from a slow disk.
TEST(Engine, IsLeftInTheMidstOfATokenToo) {
  const dsfp4::testing::ScratchFolder folder;
  dsfp4::testing::make_tiny_checkpoint(dsfp4::testing::TinyKind::kNvfp4, kModelLayers)
      .write(folder.path());
  for (const bool tiered : {false, true}) {
    Engine engine(folder.path(), load_options(tiered));
    GenerateOptions options;
    options.max_tokens = 4;
    options.stop_ids.emplace();
    const std::vector<std::int32_t> whole = engine.generate(kPrompt, options, {}).tokens;
    ASSERT_EQ(whole.size(), 4u);

    for (int most = 0; most < kModelLayers; ++most) {
      int asked = -1;  // since the first token; none yet
      options.keep_going = [&] { return asked < 0 || asked++ < most; };
      const GenerationResult left = engine.generate(kPrompt, options, [&](std::int32_t) {
        EXPECT_EQ(asked, -1) << "a second token";
        asked = 0;
        return true;
      });
      EXPECT_EQ(left.finish_reason, FinishReason::kCancelled);
      EXPECT_EQ(left.tokens, std::vector<std::int32_t>{whole[0]});
      options.keep_going = {};
      EXPECT_EQ(engine.generate(kPrompt, options, {}).tokens, whole);
    }
  }
}

TEST(Engine, AForwardThatIsLeftSaysSo) {
  const dsfp4::testing::ScratchFolder folder;
  dsfp4::testing::make_tiny_checkpoint(dsfp4::testing::TinyKind::kNvfp4, kModelLayers)
      .write(folder.path());
  Engine engine(folder.path(), load_options(true));
  std::vector<float> logits(std::size(kPrompt) *
                            static_cast<std::size_t>(engine.spec().vocab_size));
  for (const bool decode : {false, true}) {
    ForwardOptions options;
    options.decode = decode;
    int left = 3;
    options.keep_going = [&] { return left-- > 0; };
    EXPECT_THROW(engine.forward(kPrompt, logits, options), CancelledError);
    options.keep_going = {};
    EXPECT_NO_THROW(engine.forward(kPrompt, logits, options));
  }
}

// An export may leave some layers' experts in another format.
TEST(Engine, LayersMayHaveExpertsOfSeveralFormats) {
  const dsfp4::testing::ScratchFolder folder;
  dsfp4::testing::make_tiny_checkpoint(dsfp4::testing::TinyKind::kMixed, kModelLayers)
      .write(folder.path());
  for (const char* const device : {"reference", "cpu"}) {
    std::vector<float> logits[2];
    for (const bool tiered : {false, true}) {
      LoadOptions options = load_options(tiered);
      options.device = device;
      Engine engine(folder.path(), options);
      EXPECT_EQ(engine.stats().tiered, tiered);
      logits[tiered ? 1 : 0].resize(std::size(kPrompt) *
                                    static_cast<std::size_t>(engine.spec().vocab_size));
      engine.forward(kPrompt, logits[tiered ? 1 : 0], {});
    }
    EXPECT_EQ(logits[0], logits[1]) << device;
    EXPECT_NE(logits[0], std::vector<float>(logits[0].size(), logits[0][0])) << device;
  }
}

}  // namespace
}  // namespace dsfp4::engine
