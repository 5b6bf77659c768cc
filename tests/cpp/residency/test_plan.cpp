#include <algorithm>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <optional>
#include <random>
#include <string>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "memory/limits.h"
#include "residency/plan.h"

namespace dsfp4::residency {
namespace {

constexpr std::uint64_t kUnbounded = std::numeric_limits<std::uint64_t>::max();

// 100 experts, 10,000 bytes as they are and 120 a slot; 1000 bytes of everything else.
ModelBytes small_model() {
  ModelBytes model;
  model.dense = 600;
  model.experts = 100;
  model.expert_bytes = 10'000;
  model.expert_slot = 120;
  model.experts_per_token = 4;
  model.moe_layers = 2;
  model.kv_block = 50;
  model.steps = {{256, 150}};
  model.reader = 50;
  return model;
}

constexpr std::int64_t kContext = 256;  // 4 blocks: 200 bytes
constexpr std::uint64_t kRest = 1000;
constexpr std::uint64_t kStaging = 8 * 120;

Wishes wishes_of(std::optional<std::uint64_t> cache = {},
                 std::optional<std::uint64_t> prefetch = {}) {
  return {.max_context = kContext, .cpu_cache_size = cache, .prefetch_size = prefetch};
}

// A process of 3000 bytes that may have `room` more, but for what is not counted.
Budgets room_for(std::uint64_t room) {
  return {.ram_limit = 3000 + memory::kUncountedBytes + room,
          .machine = {kUnbounded, kUnbounded, 3000},
          .vram = {}};
}

Plan plan(const ModelBytes& model, std::uint64_t room, const Wishes& wishes = wishes_of()) {
  return make_plan(model, room_for(room), wishes);
}

// The refusal's sentence and numbers.
std::optional<MemoryLimitError> refusal(const ModelBytes& model, const Budgets& budgets,
                                        const Wishes& wishes = wishes_of()) {
  try {
    make_plan(model, budgets, wishes);
    return std::nullopt;
  } catch (const MemoryLimitError& error) {
    return error;
  }
}

std::uint64_t floor_of(const ModelBytes& model, std::uint64_t room,
                       const Wishes& wishes = wishes_of()) {
  const auto error = refusal(model, room_for(room), wishes);
  return error ? error->needed() - 3000 - memory::kUncountedBytes : 0;
}

bool says(const std::optional<MemoryLimitError>& error, const char* words) {
  return error && std::string(error->what()).find(words) != std::string::npos;
}

TEST(Plan, LoadsEverythingThatFits) {
  const Plan whole = plan(small_model(), 11'000);
  EXPECT_FALSE(whole.tiered);
  EXPECT_EQ(whole.ram_bytes, 11'000u);
  EXPECT_EQ(whole.vram_bytes, 0u);
  EXPECT_EQ(whole.chunk, 256);
  EXPECT_TRUE(whole.warnings.empty());
}

TEST(Plan, CachesWhatIsLeft) {
  const Plan tiered = plan(small_model(), 10'999);
  EXPECT_TRUE(tiered.tiered);
  EXPECT_EQ(tiered.slots, 9'999u / 120u);
  EXPECT_EQ(tiered.slots - tiered.cache_slots, 8u);
  EXPECT_EQ(tiered.ram_bytes, kRest + tiered.slots * 120);
}

TEST(Plan, ObeysWishes) {
  const Plan small = plan(small_model(), 1'000'000, wishes_of(6000, 240));
  EXPECT_TRUE(small.tiered);
  EXPECT_EQ(small.cache_slots, 50u);
  EXPECT_EQ(small.slots, 52u);
  EXPECT_FALSE(plan(small_model(), 1'000'000, wishes_of(12'000)).tiered);
  EXPECT_EQ(plan(small_model(), 1'000'000, wishes_of(0)).cache_slots, 0u);
  EXPECT_THROW(plan(small_model(), 1'000'000, wishes_of(600, 100)), ParameterError);
}

TEST(Plan, RefusesBelowTheFloorWithTheNumber) {
  EXPECT_NO_THROW(plan(small_model(), kRest + kStaging));
  const auto error = refusal(small_model(), room_for(kRest + kStaging - 1));
  ASSERT_TRUE(error);
  EXPECT_EQ(error->needed(), error->available() + 1);
  EXPECT_TRUE(says(error, "raise ram_limit, or lower max_context to 192"));
}

TEST(Plan, ACacheThatDoesNotFitIsRefusedWithTheNumber) {
  const Wishes wishes = wishes_of(6059);  // 50 slots
  const std::uint64_t floor = floor_of(small_model(), 5000, wishes);
  EXPECT_EQ(floor, kRest + kStaging + 6000);
  EXPECT_EQ(plan(small_model(), floor, wishes).cache_slots, 50u);
  EXPECT_TRUE(says(refusal(small_model(), room_for(floor - 1), wishes), "lower cpu_cache_size"));
  EXPECT_EQ(floor_of(small_model(), 10, wishes), floor);  // not that of a model without a cache
}

TEST(Plan, WhatMayBeDoneDependsOnWhatBinds) {
  Budgets budgets{.ram_limit = 0, .machine = {kUnbounded, 500, 3000}, .vram = {}};
  EXPECT_TRUE(says(refusal(small_model(), budgets), "free some memory, or set ram_limit"));
  budgets.ram_limit = 1'000'000'000;
  const auto error = refusal(small_model(), budgets);
  EXPECT_TRUE(says(error, "would make the machine swap"));
  ASSERT_TRUE(error);
  EXPECT_EQ(error->available(), 3500u);
  budgets.machine.available = 500'000'000;
  EXPECT_EQ(make_plan(small_model(), budgets, wishes_of()).warnings.size(), 1u);
}

TEST(Plan, AContextThatCannotBeCountedIsRefused) {
  ModelBytes model = small_model();
  model.kv_block = kUnbounded / 3;
  const auto error = refusal(model, room_for(1'000'000));
  ASSERT_TRUE(error);
  EXPECT_EQ(error->needed(), kUnbounded);
  EXPECT_FALSE(says(error, "max_context"));  // none would fit
}

// Ten layers of 80 bytes each, of 1200 that are not experts; two buffers take 170.
ModelBytes with_layers() {
  ModelBytes model = small_model();
  model.layers.assign(10, 80);
  model.dense = 800;
  model.kv_block = 0;
  model.layer_buffer = 85;
  return model;
}

TEST(Plan, StreamsAsFewLayersAsNecessaryEvenlySpread) {
  const std::uint64_t whole = kRest + kStaging;
  EXPECT_EQ(plan(with_layers(), whole).streamed_layers(), 0u);
  const Plan one_byte_short = plan(with_layers(), whole - 1);
  EXPECT_EQ(one_byte_short.streamed_layers(), 3u);  // two save less than the buffers take
  EXPECT_EQ(one_byte_short.layer_buffers, 2u);
  EXPECT_TRUE(one_byte_short.tiered);
  EXPECT_EQ(one_byte_short.ram_bytes, whole - 3 * 80 + 170);
  ASSERT_EQ(one_byte_short.warnings.size(), 1u);
  EXPECT_NE(one_byte_short.warnings[0].find("3 of 10 layers"), std::string::npos);
  EXPECT_EQ(plan(with_layers(), whole - 5 * 80 + 170).streamed,
            (std::vector<bool>{false, true, false, true, false, true, false, true, false, true}));
}

TEST(Plan, TheFloorIsWithEveryLayerStreamed) {
  const std::uint64_t floor = kRest + kStaging - 10 * 80 + 170;
  EXPECT_EQ(plan(with_layers(), floor).streamed_layers(), 10u);
  EXPECT_EQ(floor_of(with_layers(), floor - 1), floor);
}

TEST(Plan, AModelWithoutExpertsIsStreamedToo) {
  ModelBytes model = with_layers();
  model.expert_bytes = model.expert_slot = model.experts = model.experts_per_token = 0;
  EXPECT_EQ(plan(model, 1000).streamed_layers(), 0u);
  const Plan streamed = plan(model, 500);
  EXPECT_FALSE(streamed.tiered);
  EXPECT_EQ(streamed.streamed_layers(), 9u);
  EXPECT_EQ(streamed.ram_bytes, 1000u - 9 * 80 + 170);
}

TEST(Plan, ChunksAreLongerWhereFewerBytesAreReadSo) {
  ModelBytes model = small_model();
  model.steps = {{256, 150}, {512, 200}, {1000, 5000}};
  EXPECT_EQ(plan(model, 10'000).chunk, 512);  // 66 cached experts for 67; 1000 rows leave 26
  EXPECT_EQ(plan(model, 11'000).chunk, 256);  // loaded whole: nothing is read again
  EXPECT_EQ(plan(model, kRest + kStaging).chunk, 256);  // longer ones do not fit
}

TEST(Plan, SlotsChangeAndTheRestStays) {
  const Budgets budgets = room_for(5000);
  const Plan before = make_plan(small_model(), budgets, wishes_of());
  const Plan after =
      with_slots(before, small_model(), budgets, {.cpu_cache_size = 1200, .prefetch_size = {}});
  EXPECT_EQ(after.cache_slots, 10u);
  EXPECT_EQ(after.slots, 18u);
  EXPECT_EQ(after.ram_bytes, kRest + 18 * 120);
  EXPECT_EQ(after.chunk, before.chunk);
  EXPECT_EQ(with_slots(after, small_model(), budgets, {}).cache_slots, before.cache_slots);
  const auto change = [&](const Wishes& wishes) {
    with_slots(before, small_model(), budgets, wishes);
  };
  EXPECT_THROW(change({.cpu_cache_size = 4000, .prefetch_size = {}}), MemoryLimitError);
  EXPECT_THROW(change({.cpu_cache_size = {}, .prefetch_size = 5000}), MemoryLimitError);
}

// ---- properties, over models of every shape

class AnyModel {
 public:
  explicit AnyModel(std::uint64_t seed) : random_(seed) {
    const std::uint64_t scale = std::uint64_t{1} << number(10, 30);
    for (std::uint64_t i = number(0, 12); i > 0; --i) model.layers.push_back(number(1, scale / 5));
    for (const std::uint64_t layer : model.layers) {
      model.layer_buffer = std::max(model.layer_buffer, layer + 4096);
    }
    model.dense = std::accumulate(model.layers.begin(), model.layers.end(), number(0, scale));
    if (number(0, 9) > 0) {
      model.experts = number(1, 600);
      model.experts_per_token = number(1, std::min<std::uint64_t>(8, model.experts));
      model.expert_slot = number(1, scale / 10);
      model.expert_bytes = model.experts * model.expert_slot + number(0, 500);
    }
    model.kv_block = number(1, scale / 20);
    model.reader = number(0, scale / 20);
    wishes.max_context = static_cast<std::int64_t>(number(1, 5000));
    wishes.prefetch_layers = static_cast<std::int64_t>(number(1, 3));
    const std::uint64_t row = number(1, 800'000);
    for (std::int64_t rows = 256; rows <= 4096; rows *= 2) {
      const std::int64_t chunk = std::min(rows, wishes.max_context);
      if (!model.steps.empty() && chunk == model.steps.back().rows) break;
      model.steps.push_back({chunk, row * static_cast<std::uint64_t>(chunk)});
    }
  }

  std::uint64_t number(std::uint64_t least, std::uint64_t most) {
    return std::uniform_int_distribution<std::uint64_t>(least, most)(random_);
  }
  /// From nothing to more than everything.
  std::uint64_t room() {
    const auto blocks = static_cast<std::uint64_t>((wishes.max_context + 63) / 64);
    const std::uint64_t whole = model.dense + model.expert_bytes + model.reader +
                                blocks * model.kv_block + model.steps.front().bytes;
    return number(0, whole + whole / 4);
  }

  ModelBytes model;
  Wishes wishes;

 private:
  std::mt19937_64 random_;
};

constexpr std::uint64_t kSeeds = 3000;

std::uint64_t bytes_of(const AnyModel& any, const Plan& plan) {
  const ModelBytes& model = any.model;
  std::uint64_t bytes = model.dense + model.reader;
  for (std::size_t i = 0; i < plan.streamed.size(); ++i) {
    if (plan.streamed[i]) bytes -= model.layers[i];
  }
  if (plan.streamed_layers() > 0) bytes += plan.layer_buffers * model.layer_buffer;
  bytes += plan.tiered ? plan.slots * model.expert_slot : model.expert_bytes;
  for (std::int64_t tokens = 0; tokens < any.wishes.max_context; tokens += 64) {
    bytes += model.kv_block;
  }
  for (const ModelBytes::Step& step : model.steps) {
    if (step.rows == plan.chunk) bytes += step.bytes;
  }
  return bytes;
}

TEST(PlanProperty, WhatIsPlannedFitsByAnotherSum) {
  std::size_t plans = 0;
  for (std::uint64_t seed = 0; seed < kSeeds; ++seed) {
    AnyModel any(seed);
    const std::uint64_t room = any.room();
    if (any.number(0, 3) == 0) any.wishes.cpu_cache_size = any.number(0, room);
    if (refusal(any.model, room_for(room), any.wishes)) continue;
    const Plan made = plan(any.model, room, any.wishes);
    ASSERT_EQ(made.ram_bytes, bytes_of(any, made)) << seed;
    ASSERT_LE(made.ram_bytes, room) << seed;
    ++plans;
  }
  EXPECT_GT(plans, kSeeds / 4);
}

TEST(PlanProperty, ARefusalsNumberIsExactAndItsContextLoads) {
  std::size_t refusals = 0;
  std::size_t contexts = 0;
  for (std::uint64_t seed = 0; seed < kSeeds; ++seed) {
    AnyModel any(seed);
    Budgets budgets = room_for(any.room());
    const auto error = refusal(any.model, budgets, any.wishes);
    if (!error) continue;
    ++refusals;
    const std::string text = error->what();
    if (const std::size_t at = text.find("max_context to "); at != text.npos) {
      Wishes shorter = any.wishes;
      shorter.max_context = std::strtoll(text.c_str() + at + 15, nullptr, 10);
      ASSERT_LT(shorter.max_context, any.wishes.max_context) << seed;
      ASSERT_FALSE(refusal(any.model, budgets, shorter)) << seed;
      ++contexts;
    }
    budgets.ram_limit = error->needed();
    ASSERT_FALSE(refusal(any.model, budgets, any.wishes)) << seed;
    --budgets.ram_limit;
    ASSERT_TRUE(refusal(any.model, budgets, any.wishes)) << seed;
  }
  EXPECT_GT(refusals, kSeeds / 10);
  EXPECT_GT(contexts, kSeeds / 50);
}

// Dense weights come before experts, and longer chunks before some of the cache.
TEST(PlanProperty, MoreMemoryNeverStreamsMoreNorCachesLess) {
  std::size_t compared = 0;
  for (std::uint64_t seed = 0; seed < kSeeds; ++seed) {
    AnyModel any(seed);
    const std::uint64_t less = any.room();
    const std::uint64_t more = less + any.number(0, less / 8);
    if (refusal(any.model, room_for(less), any.wishes)) continue;
    const Plan a = plan(any.model, less, any.wishes);
    const Plan b = plan(any.model, more, any.wishes);
    ASSERT_LE(b.streamed_layers(), a.streamed_layers()) << seed;
    if (!a.tiered) {
      ASSERT_FALSE(b.tiered) << seed;
    }
    if (!a.tiered || !b.tiered || a.chunk != b.chunk || a.streamed != b.streamed) continue;
    ASSERT_GE(b.slots, a.slots) << seed;
    ++compared;
  }
  EXPECT_GT(compared, kSeeds / 20);
}

}  // namespace
}  // namespace dsfp4::residency
