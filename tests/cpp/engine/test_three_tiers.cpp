// A model whose dense weights lie on the emulated device, its experts there, in RAM and in files.
// The device and the processor both compute as `reference` does, so every placement must give the
// bits of a model that lies in RAM.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <random>
#include <set>
#include <string>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "base/files.h"
#include "dsfp4/error.h"
#include "engine/three_tiers_fixture.h"
#include "residency/policy.h"

namespace dsfp4::engine {
namespace {

class ThreeTiers : public ThreeTiersFixture {};

TEST_P(ThreeTiers, AnySettingGivesTheSameBits) {
  const int settings = std::getenv("DSFP4_FULL") != nullptr ? 170 : 12;  // of each kind
  std::mt19937 random(7);
  const auto up_to = [&](std::uint32_t most) { return random() % (most + 1); };
  for (int n = 0; n < settings; ++n) {
    LoadOptions options = load_options();
    options.strategy.max_experts = up_to(9);
    options.strategy.cpu_cache_size = up_to(4) * 20e3 * 1e-9;
    options.memory.prefetch_layers = up_to(2);
    if (up_to(2) > 0) options.memory.cpu_share = 0.25 * up_to(4);
    ops::testing::EmulatedOptions device = as_a_gpu();
    if (up_to(1) > 0) device.copy_bytes_per_second = 1e8;
    const auto engine = load(options, device);
    ASSERT_TRUE(engine->stats().tiered);
    EXPECT_EQ(ask(*engine), right_) << n;
    EXPECT_EQ(ask(*engine), right_) << n;
    const ModelStats stats = engine->stats();
    EXPECT_EQ(stats.device_cache_slots, static_cast<std::uint64_t>(*options.strategy.max_experts));
    EXPECT_GT(stats.uploads + stats.cpu_bytes, 0u);
  }
}

TEST_P(ThreeTiers, EachTierIsUsed) {
  LoadOptions options = load_options();
  options.strategy.max_experts = 6;
  options.memory.cpu_share = 0.5;
  const auto engine = load(options, as_a_gpu());
  EXPECT_EQ(ask(*engine), right_);
  const ModelStats stats = engine->stats();
  EXPECT_GT(stats.device_hits, 0u);
  EXPECT_GT(stats.uploads, 0u);
  EXPECT_GT(stats.cpu_bytes, 0u);
  EXPECT_GT(stats.misses + stats.prefetched, 0u);
}

TEST_P(ThreeTiers, AnExpertCrossesEachWireOnceAPrompt) {
  LoadOptions options = load_options();
  options.strategy.max_experts = 0;
  options.strategy.cpu_cache_size = 0.0;
  options.memory.prefetch_layers = 0;
  options.memory.cpu_share = 0.0;
  LoadOptions in_ram = load_options();
  in_ram.strategy.cpu_cache_size = 0.0;
  in_ram.memory.prefetch_layers = 0;
  const auto beside = load(options, as_a_gpu());
  Engine alone(folder_.path(), in_ram);
  for (Engine* engine : {beside.get(), &alone}) {
    const Ids ids = {3, 10, 17, 24, 1, 8, 15, 22, 29, 6, 13, 20, 27, 4, 11, 18, 25, 2, 9, 16};
    const std::int64_t layers = engine->spec().moe_layers();
    const auto of_layer = ids.size() * static_cast<std::size_t>(engine->spec().router.top_k);
    Floats logits(ids.size() * static_cast<std::size_t>(engine->spec().vocab_size));
    Ids chosen(static_cast<std::size_t>(layers) * of_layer);
    ForwardOptions forward;
    forward.chosen_experts = chosen;
    const ModelStats before = engine->stats();
    engine->forward(ids, logits, forward);
    const ModelStats after = engine->stats();
    EXPECT_EQ(logits, right_.prompt);
    std::uint64_t distinct = 0;
    for (std::size_t first = 0; first < chosen.size(); first += of_layer) {
      distinct += std::set(chosen.begin() + static_cast<std::ptrdiff_t>(first),
                           chosen.begin() + static_cast<std::ptrdiff_t>(first + of_layer))
                      .size();
    }
    EXPECT_EQ(after.misses - before.misses, distinct);
    const std::uint64_t used = after.used_bytes - before.used_bytes;
    EXPECT_GE(after.read_bytes - before.read_bytes, used);  // files are read by whole blocks
    EXPECT_LT(after.read_bytes - before.read_bytes, used + distinct * 20'000);
    if (engine != beside.get()) continue;
    EXPECT_EQ(after.uploads - before.uploads, distinct);
    EXPECT_EQ(after.uploaded_bytes - before.uploaded_bytes, used);
  }
}

TEST_P(ThreeTiers, TheNextLayersExpertsArePredicted) {
  LoadOptions options = load_options();
  options.strategy.max_experts = 3;
  for (const std::int64_t layers : {0, 1, 2}) {
    options.memory.prefetch_layers = layers;
    const auto engine = load(options, as_a_gpu());
    EXPECT_EQ(ask(*engine), right_);
    const ModelStats stats = engine->stats();
    EXPECT_EQ(stats.prefetched > 0, layers > 0);
    EXPECT_EQ(stats.predicted_used > 0, layers > 0);
  }
}

TEST_P(ThreeTiers, TheProcessorsShareIsWhatIsAskedFor) {
  for (const double share : {0.0, 1.0}) {
    LoadOptions options = load_options();
    options.strategy.max_experts = 0;
    options.memory.cpu_share = share;
    const auto engine = load(options, as_a_gpu());
    GenerateOptions generate;
    generate.max_tokens = 5;
    generate.stop_ids.emplace();
    engine->generate(Ids{5}, generate, {});
    const ModelStats before = engine->stats();
    engine->generate(Ids{5}, generate, {});  // a prompt of one token, and four steps
    const ModelStats after = engine->stats();
    EXPECT_EQ(after.cpu_bytes > before.cpu_bytes, share == 1.0);
    EXPECT_EQ(after.device_hits, 0u);
  }
}

TEST_P(ThreeTiers, TheProcessorHelpsWithAShortPrompt) {
  LoadOptions options = load_options();
  options.strategy.max_experts = 0;
  options.memory.cpu_share = 0.5;
  const auto engine = load(options, as_a_gpu());
  Engine alone(folder_.path(), load_options());
  for (const std::int64_t tokens : {1, 5, 16, 17}) {
    Ids ids(static_cast<std::size_t>(tokens));
    for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::int32_t>(3 * i % 29);
    Floats logits(ids.size() * static_cast<std::size_t>(engine->spec().vocab_size));
    Floats right(logits.size());
    const ModelStats before = engine->stats();
    engine->forward(ids, logits, {});
    const ModelStats after = engine->stats();
    alone.forward(ids, right, {});
    EXPECT_EQ(after.cpu_bytes > before.cpu_bytes, tokens <= ops::kMostHostRows) << tokens;
    EXPECT_GT(after.uploads, before.uploads) << tokens;
    for (std::size_t i = 0; i < logits.size(); ++i) {  // the order of a sum is another one
      ASSERT_NEAR(logits[i], right[i], 1e-4f * (1.0f + std::abs(right[i]))) << tokens;
    }
  }
}

// As if the routed experts gave nothing: no wire is used, the host waits for nothing but logits,
// and steps with experts find their recordings as they were.
TEST_P(ThreeTiers, TheDensePartRunsWithoutTheRoutedExperts) {
  LoadOptions options = load_options();
  options.strategy.max_experts = 3;
  const auto engine = load(options, as_a_gpu());
  ASSERT_EQ(ask(*engine), right_);
  const Ids ids = {3, 10, 17, 24, 1};
  const auto dense = [&](Engine& of) {
    Floats logits(ids.size() * static_cast<std::size_t>(of.spec().vocab_size));
    ForwardOptions forward;
    forward.decode = true;
    forward.routed_experts = false;
    of.forward(ids, logits, forward);
    return logits;
  };
  const ModelStats before = engine->stats();
  const std::int64_t waits = device_->counts().host_waits;
  const Floats logits = dense(*engine);
  const ModelStats after = engine->stats();
  EXPECT_EQ(device_->counts().host_waits - waits, static_cast<std::int64_t>(ids.size()));
  EXPECT_EQ(after.uploads, before.uploads);
  EXPECT_EQ(after.device_hits, before.device_hits);
  EXPECT_EQ(after.cpu_bytes, before.cpu_bytes);
  EXPECT_EQ(after.read_bytes, before.read_bytes);
  EXPECT_EQ(dense(*engine), logits);
  EXPECT_EQ(ask(*engine), right_);

  LoadOptions in_ram = load_options();
  in_ram.strategy.cpu_cache_size = 0.0;
  Engine tiered(folder_.path(), in_ram);
  ASSERT_TRUE(tiered.stats().tiered);
  EXPECT_EQ(dense(tiered), logits);
  Engine whole(folder_.path(), load_options());
  ASSERT_FALSE(whole.stats().tiered);
  EXPECT_THROW(dense(whole), ParameterError);
}

TEST_P(ThreeTiers, AnErrorOfTheDeviceLeavesEverythingInOrder) {
  LoadOptions options = load_options();
  options.strategy.max_experts = 3;
  const auto engine = load(options, as_a_gpu());
  ASSERT_EQ(ask(*engine), right_);
  for (std::int64_t n = 1; n < 120; n += 7) {
    for (const bool copy : {false, true}) {
      if (copy) {
        device_->fail_copy(ops::Queue::kUpload, n % 17 + 1);
      } else {
        device_->fail_op(n);
      }
      EXPECT_THROW(ask(*engine), CudaError) << n << copy;
      device_->clear_error();
      EXPECT_EQ(ask(*engine), right_) << n << copy;
    }
  }
}

// Copies are slow here, so that an op of another layer fails before they are made, and other tokens
// want other experts in VRAM: those that were not copied must not be found there.
TEST_P(ThreeTiers, AnErrorElsewhereLeavesNoExpertThatWasNotCopied) {
  LoadOptions options = load_options();
  options.strategy.max_experts = 6;
  options.memory.cpu_share = 0.0;
  options.cache_policy = "lru";
  ops::testing::EmulatedOptions device = as_a_gpu();
  device.copy_bytes_per_second = 3e7;
  const auto engine = load(options, device);
  GenerateOptions generate;
  generate.max_tokens = 30;
  generate.stop_ids.emplace();
  for (std::int32_t n = 0; n < 24; ++n) {
    device_->fail_op(90 + 9 * n);
    EXPECT_THROW(engine->generate(Ids{n}, generate, {}), CudaError) << n;
    device_->clear_error();
    EXPECT_EQ(ask(*engine), right_) << n;
  }
}

TEST_P(ThreeTiers, AGenerationThatIsLeftLeavesEverythingInOrder) {
  LoadOptions options = load_options();
  options.strategy.max_experts = 3;
  const auto engine = load(options, as_a_gpu());
  for (int most = 0; most < 40; ++most) {
    GenerateOptions generate;
    generate.max_tokens = 6;
    generate.stop_ids.emplace();
    int asked = 0;
    generate.keep_going = [&] { return asked++ < most; };
    engine->generate(Ids{5, 3, 9}, generate, {});
  }
  EXPECT_EQ(ask(*engine), right_);
}

// VRAM and RAM hold what one cache as large as both would.
TEST_P(ThreeTiers, TheyMissNoMoreThanOneCacheOfBothSizes) {
  constexpr std::int64_t kExperts = 32, kParts = 4, kTokens = 60, kTopK = 2;
  dsfp4::testing::make_tiny_checkpoint(GetParam(), kModelLayers, kExperts).write(folder_.path());
  constexpr std::int64_t kLayers = kModelLayers - 1;
  // Some experts are chosen more often than others.
  std::mt19937 random(3);
  const auto choose = [&] {
    const double u = static_cast<double>(random()) / 4294967296.0;
    return static_cast<std::int32_t>(u * u * static_cast<double>(kExperts));
  };
  Ids used(static_cast<std::size_t>(kLayers * kParts * kTokens * kTopK));
  for (std::size_t i = 0; i < used.size(); i += kTopK) {
    used[i] = choose();
    do used[i + 1] = choose();
    while (used[i + 1] == used[i]);
  }
  for (const char* policy : {"lru", "lfu"}) {
    for (const std::optional<double> share : {std::optional<double>(), {0.0}, {0.5}, {1.0}}) {
      LoadOptions options = load_options();
      options.cache_policy = policy;
      options.memory.cpu_share = share;
      options.memory.prefetch_layers = 0;
      options.strategy.max_experts = 20;
      options.strategy.cpu_cache_size = 20 * 12e3 * 1e-9;
      const auto engine = load(options, as_a_gpu());
      const Ids ids(kTokens, 5);
      Floats logits(ids.size() * static_cast<std::size_t>(engine->spec().vocab_size));
      for (std::int64_t part = 0; part < kParts; ++part) {
        Ids forced;
        for (std::int64_t layer = 0; layer < kLayers; ++layer) {
          const std::int64_t first = (layer * kParts + part) * kTokens * kTopK;
          forced.insert(forced.end(), used.begin() + first, used.begin() + first + kTokens * kTopK);
        }
        ForwardOptions forward;
        forward.decode = true;
        forward.forced_experts = forced;
        engine->forward(ids, logits, forward);
      }
      const ModelStats stats = engine->stats();
      const auto values = residency::make_policy(policy, kLayers, kExperts);
      const Floats scores(static_cast<std::size_t>(kLayers * kParts * kTokens * kExperts));
      const std::int64_t least = residency::replay_misses(
          *values, kLayers, kExperts, kTopK, used, scores,
          static_cast<std::int64_t>(stats.cache_slots + stats.device_cache_slots), 0);
      EXPECT_LE(static_cast<double>(stats.misses), 1.02 * static_cast<double>(least))
          << policy << share.value_or(-1.0);
      EXPECT_GT(stats.device_returns, 0u);
    }
  }
}

TEST_P(ThreeTiers, TheStrategyChangesBetweenGenerations) {
  LoadOptions options = load_options();
  options.strategy.max_experts = 3;
  const auto engine = load(options, as_a_gpu());
  for (const std::int64_t experts : {0, 7, 2, 5}) {
    MemoryStrategy strategy;
    strategy.max_experts = experts;
    strategy.cpu_cache_size = static_cast<double>(experts) * 15e3 * 1e-9;
    engine->set_memory_strategy(strategy);
    EXPECT_EQ(ask(*engine), right_) << experts;
    EXPECT_EQ(engine->stats().device_cache_slots, static_cast<std::uint64_t>(experts));
  }
}

// Experts in VRAM stay, or go back to RAM: nothing is read again.
TEST_P(ThreeTiers, AnotherNumberOfExpertsInVramReloadsNothing) {
  LoadOptions options = load_options();
  options.strategy.max_experts = 5;
  options.memory.prefetch_layers = 0;
  const auto engine = load(options, as_a_gpu());
  EXPECT_EQ(ask(*engine), right_);
  EXPECT_EQ(ask(*engine), right_);
  const auto read = [&] { return engine->stats().read_bytes; };
  const std::uint64_t before = read();
  for (const std::int64_t experts : {9, 2, 7}) {
    MemoryStrategy strategy;
    strategy.max_experts = experts;
    engine->set_memory_strategy(strategy);
    EXPECT_EQ(ask(*engine), right_);
    EXPECT_EQ(read(), before) << experts;
  }
  EXPECT_GT(engine->stats().device_hits, 0u);
}

// The bits are those of a model without a trace, and each tier has spans.
TEST_P(ThreeTiers, ATraceShowsEveryTier) {
  const std::filesystem::path path = folder_.path() / "trace.json";
  LoadOptions options = load_options();
  options.strategy.max_experts = 3;
  options.memory.cpu_share = 0.5;
  ops::testing::EmulatedOptions device = as_a_gpu();
  device.copy_bytes_per_second = 1e8;
  ModelStats stats;
  {
    const auto engine = load(options, device);
    EXPECT_EQ(device_->counts().timed_events, 0);
  }
  options.trace_file = path.string();
  {
    const auto engine = load(options, device);
    EXPECT_EQ(ask(*engine), right_);
    EXPECT_EQ(ask(*engine), right_);
    EXPECT_GT(device_->counts().replayed, 0);
    stats = engine->stats();
  }
  EXPECT_EQ(device_->counts().timed_events, 0);
  std::map<std::string, std::string> tracks;  // by number
  std::map<std::string, int> spans;
  std::map<std::string, std::int64_t> last;  // end of the last span of a serial track
  std::set<std::string> on_gpu;
  std::uint64_t copied = 0;
  for (const auto& event : nlohmann::json::parse(read_whole_file(path))) {
    const std::string phase = event.at("ph");
    if (phase == "M") {
      if (event.at("name") != "thread_name") continue;
      tracks[event.at("tid").dump()] = event.at("args").at("name");
      continue;
    }
    const std::string track = tracks.at(event.at("tid").dump());
    if (phase == "b" || phase == "X") ++spans[track];
    if (phase != "X") continue;
    const std::int64_t start = event.at("ts");
    EXPECT_GE(start, last[track]) << track;
    last[track] = start + event.at("dur").get<std::int64_t>();
    const std::string name = event.at("name");
    if (track == "GPU") on_gpu.insert(name);
    if (track == "PCIe") {
      copied += event.at("args").at("bytes").get<std::uint64_t>();
      EXPECT_NE(name.find(" expert "), std::string::npos) << name;
    }
  }
  EXPECT_EQ(static_cast<std::uint64_t>(spans["PCIe"]), stats.uploads);
  EXPECT_EQ(copied, stats.uploaded_bytes);
  EXPECT_GT(spans["SSD"], 0);
  EXPECT_GT(spans["CPU"], 0);
  EXPECT_GT(spans["steps"], 0);
  for (std::int64_t layer = 0; layer < kModelLayers; ++layer) {
    EXPECT_TRUE(on_gpu.contains("layer " + std::to_string(layer) + " dense"));
  }
  const std::string last_layer = "layer " + std::to_string(kModelLayers - 1);
  EXPECT_TRUE(on_gpu.contains(last_layer + " experts"));
}

TEST_P(ThreeTiers, AnErrorWithATraceLeavesEverythingInOrder) {
  LoadOptions options = load_options();
  options.strategy.max_experts = 3;
  options.trace_file = (folder_.path() / "trace.json").string();
  const auto engine = load(options, as_a_gpu());
  for (std::int64_t n = 1; n < 120; n += 17) {
    device_->fail_copy(ops::Queue::kUpload, n % 17 + 1);
    EXPECT_THROW(ask(*engine), CudaError) << n;
    device_->clear_error();
    EXPECT_EQ(ask(*engine), right_) << n;
    device_->fail_op(n);
    EXPECT_THROW(ask(*engine), CudaError) << n;
    device_->clear_error();
    EXPECT_EQ(ask(*engine), right_) << n;
  }
}

TEST_P(ThreeTiers, EverythingGoesBack) {
  LoadOptions options = load_options();
  options.strategy.max_experts = 3;
  ask(*load(options, as_a_gpu()));
  EXPECT_EQ(device_->memory().used(), 0u);
  EXPECT_EQ(device_->staging().used(), 0u);
}

INSTANTIATE_TEST_SUITE_P(Kinds, ThreeTiers, ::testing::ValuesIn(dsfp4::testing::kTinyKinds));
// Experts of several formats in one model.
INSTANTIATE_TEST_SUITE_P(Mixed, ThreeTiers, ::testing::Values(dsfp4::testing::TinyKind::kMixed));

}  // namespace
}  // namespace dsfp4::engine
