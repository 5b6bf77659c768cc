// A model over VRAM, RAM and the files, in numbers that are worked out by hand.
#include <limits>
#include <optional>
#include <string>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "memory/limits.h"
#include "residency/plan.h"
#include "residency/small_model.h"
#include "residency/vram_budgets.h"

namespace dsfp4::residency {
namespace {

Wishes with_cache(std::uint64_t bytes) {
  Wishes wishes = wishes_of();
  wishes.cpu_cache_size = bytes;
  return wishes;
}

TEST(PlanInVram, AModelThatFitsIsThereWhole) {
  const Plan whole = plan(kWhole, 750);
  EXPECT_FALSE(whole.tiered);
  EXPECT_FALSE(whole.embedding_in_ram);
  EXPECT_EQ(whole.slots + whole.device_slots, 0u);
  EXPECT_EQ(whole.dense_bytes, 600u);
  EXPECT_EQ(whole.expert_bytes, 10'000u);
  EXPECT_EQ(whole.kv_bytes, 200u);
  EXPECT_EQ(whole.vram_bytes, kWhole);
  EXPECT_EQ(whole.ram_bytes, 0u);
  EXPECT_EQ(whole.load_bytes, 750u);  // reader and buffer
  const auto error = refusal(small_model(), budgets_of(kWhole, 749), wishes_of());
  ASSERT_TRUE(error);
  EXPECT_EQ(error->needed(), error->available() + 1);
  EXPECT_FALSE(says(error, "VRAM"));
}

TEST(PlanInVram, OneByteLessMakesThreeTiers) {
  const Plan tiers = plan(kWhole - 1);
  EXPECT_TRUE(tiers.tiered);
  EXPECT_TRUE(tiers.embedding_in_ram);
  EXPECT_EQ(tiers.device_cache_slots, 69u);  // (10949 - 1890) / 130
  EXPECT_EQ(tiers.device_slots, 77u);
  EXPECT_EQ(tiers.device_expert_bytes, 77u * 130);
  EXPECT_EQ(tiers.dense_bytes, 500u);
  EXPECT_EQ(tiers.vram_bytes, kVram + 77 * 130);
  EXPECT_EQ(tiers.cache_slots, 100u);
  EXPECT_EQ(tiers.slots, 108u);
  EXPECT_EQ(tiers.expert_bytes, 108u * 120);
  EXPECT_EQ(tiers.embedding_bytes, 110u);
  EXPECT_EQ(tiers.host_step_bytes, 30u);
  EXPECT_EQ(tiers.ram_bytes, kRam + 108 * 120);
  EXPECT_EQ(tiers.streamed_layers(), 0u);
}

TEST(PlanInVram, EitherCacheMayAskForTiers) {
  EXPECT_FALSE(plan(kEnough, kEnough, wishes_of(100)).tiered);
  EXPECT_FALSE(plan(kEnough, kEnough, with_cache(12'000)).tiered);
  const Plan few = plan(kEnough, kEnough, wishes_of(7));
  EXPECT_TRUE(few.tiered);
  EXPECT_EQ(few.device_cache_slots, 7u);
  EXPECT_EQ(few.device_slots, 15u);
  EXPECT_EQ(plan(kEnough, kEnough, wishes_of(0)).device_slots, kDeviceRing);
  const Plan small = plan(kEnough, kEnough, with_cache(11'999));
  EXPECT_TRUE(small.tiered);
  EXPECT_EQ(small.cache_slots, 99u);
  EXPECT_EQ(small.device_cache_slots, 100u);  // never more than there are
  EXPECT_EQ(small.device_slots, 108u);
}

TEST(PlanInVram, ASlotIsCachedFromItsLastByteOn) {
  EXPECT_EQ(plan(kVramFloor + 129).device_cache_slots, 0u);
  EXPECT_EQ(plan(kVramFloor + 130).device_cache_slots, 1u);
}

TEST(PlanInVram, BelowTheFloorTheNumberAndAContextAreNamed) {
  // 200 bytes are KV, so one byte less leaves 199: 3 blocks.
  EXPECT_TRUE(says(floor_is(kVramFloor), "or lower max_context to 192;"));
  // Nothing is left for a block.
  const auto error = refusal(small_model(), budgets_of(kVramFloor - 200 + 49), wishes_of());
  ASSERT_TRUE(error);
  EXPECT_EQ(error->needed(), kVramFloor);
  EXPECT_FALSE(says(error, "max_context"));
  EXPECT_FALSE(says(error, "or lower"));
}

TEST(PlanInVram, TooManyExpertsAreNamedWithHowManyFit) {
  EXPECT_TRUE(says(floor_is(kVramFloor + 20 * 130, wishes_of(20)), "lower max_experts to 19"));
  EXPECT_TRUE(says(refusal(small_model(), budgets_of(kWhole - 1), wishes_of(1'000)),
                   "lower max_experts to 69"));
  EXPECT_TRUE(says(refusal(small_model(), budgets_of(kVramFloor - 1), wishes_of(20)),
                   "lower max_experts to 0 and max_context to 192"));
}

TEST(PlanInVram, WhatIsReservedIsTakenFirst) {
  EXPECT_FALSE(plan(kWhole + 500, kEnough, wishes_of({}, 500)).tiered);
  const Plan tiers = plan(kWhole + 499, kEnough, wishes_of({}, 500));
  EXPECT_EQ(tiers.device_cache_slots, 69u);
  EXPECT_LE(tiers.vram_bytes, kWhole - 1);
  EXPECT_TRUE(says(floor_is(kVramFloor + 500, wishes_of({}, 500)),
                   "lower max_context to 192 or gpu_reserved"));
  // Without it the model would not load either.
  EXPECT_TRUE(
      says(refusal(small_model(), budgets_of(1000), wishes_of({}, 1)), "raise memory_limit;"));
}

TEST(PlanInVram, AnEmbeddingThatIsTheHeadStaysThere) {
  ModelBytes model = small_model();
  model.embedding = model.host_embedding = 0;
  const Plan tiers = plan(kVramFloor + 100, kRamFloor - 110, wishes_of(), model);
  EXPECT_FALSE(tiers.embedding_in_ram);
  EXPECT_EQ(tiers.dense_bytes, 600u);
  EXPECT_EQ(tiers.embedding_bytes, 0u);
  floor_is(kVramFloor + 100, wishes_of(), model);
}

TEST(PlanInVram, ATinyModelTakesLessWholeThanInTiers) {
  ModelBytes model = small_model();
  model.experts = 2;
  model.expert_bytes = 240;
  const std::uint64_t whole = 600 + 240 + 200 + 150;
  ASSERT_LT(whole, kVramFloor);
  EXPECT_FALSE(plan(whole, kEnough, wishes_of(), model).tiered);
  EXPECT_TRUE(says(floor_is(whole, wishes_of(), model), "lower max_context to 192"));
}

TEST(PlanInVram, AModelWithoutExpertsIsWholeOrRefused) {
  ModelBytes model = small_model();
  model.experts = model.expert_bytes = model.expert_slot = model.device_slot = 0;
  const auto error = floor_is(600 + 200 + 150, wishes_of(), model);
  EXPECT_TRUE(says(error, "the whole model"));
  EXPECT_TRUE(says(error, "lower max_context to 192"));
}

TEST(PlanInVram, RamHoldsTheEmbeddingAndTheStaging) {
  const Plan least = plan(kVramFloor, kRamFloor);
  EXPECT_EQ(least.slots, 8u);
  EXPECT_EQ(least.cache_slots, 0u);
  EXPECT_EQ(least.ram_bytes, kRamFloor);
  EXPECT_EQ(least.load_bytes, 0u);  // the slots are taken when the buffer has gone
  EXPECT_EQ(plan(kVramFloor, kRamFloor + 120).cache_slots, 1u);
  auto error = refusal(small_model(), budgets_of(kVramFloor, kRamFloor - 1), wishes_of());
  ASSERT_TRUE(error);
  EXPECT_EQ(error->needed(), error->available() + 1);
  EXPECT_TRUE(says(error, "of RAM"));
  EXPECT_TRUE(says(error, "raise ram_limit, or lower prefetch_size"));
  EXPECT_FALSE(says(error, "max_context"));  // the KV cache is in VRAM
  error = refusal(small_model(), budgets_of(kVramFloor, kRam + 119), wishes_of());
  EXPECT_FALSE(says(error, "prefetch_size"));  // not even one slot fits
  error = refusal(small_model(), budgets_of(kVramFloor, kEnough / 100), with_cache(10'000));
  ASSERT_TRUE(error);  // 83 slots
  EXPECT_EQ(error->needed(), kProcess + memory::kUncountedBytes + kRamFloor + 83 * 120);
  EXPECT_TRUE(says(error, "lower cpu_cache_size"));
  error = refusal(small_model(), budgets_of(kVramFloor, kRamFloor - 1), with_cache(10'000));
  ASSERT_TRUE(error);
  EXPECT_EQ(error->needed(), kProcess + memory::kUncountedBytes + kRamFloor + 83 * 120);
  EXPECT_TRUE(says(error, "lower prefetch_size and cpu_cache_size"));
}

TEST(PlanInVram, RamHoldsTheBufferThatWeightsAreLoadedThrough) {
  ModelBytes model = small_model();
  model.load_buffer = 2000;
  const std::uint64_t floor = 110 + 50 + 2000;
  const Plan least = plan(kVramFloor, floor, wishes_of(), model);
  EXPECT_EQ(least.slots, 16u);  // (2160 - 190) / 120
  EXPECT_EQ(least.load_bytes, 2000u - 16 * 120 - 30);
  EXPECT_EQ(least.ram_bytes + least.load_bytes, floor);
  const auto error = refusal(model, budgets_of(kVramFloor, floor - 1), wishes_of());
  ASSERT_TRUE(error);
  EXPECT_EQ(error->needed(), error->available() + 1);
}

TEST(PlanInVram, ChunksAreLongerWhereFewerBytesAreMovedSo) {
  ModelBytes model = small_model();
  model.steps = {{256, 150, 30}, {512, 300, 60}, {1000, 5000, 90}};
  const Plan made = plan(10'000, kEnough, wishes_of(), model);
  EXPECT_EQ(made.chunk, 512);  // 66 cached experts, 65 so; 1000 rows leave 28
  EXPECT_EQ(made.step_bytes, 300u);
  EXPECT_EQ(made.host_step_bytes, 60u);
  EXPECT_EQ(plan(10'000, kEnough, wishes_of(20), model).chunk, 1000);  // they fit beside it
  EXPECT_EQ(plan(kVramFloor, kEnough, wishes_of(), model).chunk, 256);
}

TEST(PlanInVram, ChunksOfAWholeModelAreAsLongAsFits) {
  ModelBytes model = small_model();
  model.steps = {{256, 150, 30}, {512, 300, 60}, {1000, 5000, 90}};
  model.steps.push_back({2000, kSmallActivationBytes + 1, 120});
  const Plan whole = plan(4 * kSmallActivationBytes, kEnough, wishes_of(), model);
  EXPECT_FALSE(whole.tiered);
  EXPECT_EQ(whole.chunk, 1000);
  EXPECT_EQ(whole.step_bytes, 5000u);
  const std::uint64_t others = whole.vram_bytes - whole.step_bytes;
  EXPECT_EQ(plan(others + 4999, kEnough, wishes_of(), model).chunk, 512);
  EXPECT_EQ(plan(others + 299, kEnough, wishes_of(), model).chunk, 256);
  EXPECT_EQ(plan(others + 299, kEnough, wishes_of(), model).vram_bytes, others + 150);
}

// Half the chunks save 2760 bytes on a prompt. One cached expert less costs an answer 1200.
TEST(PlanInVram, ChunksAreWeighedAgainstTheCacheThatTheyTake) {
  ModelBytes model = small_model();
  model.device_slot = kSmallActivationBytes / 4;
  model.expert_bytes = model.experts * model.device_slot;
  const std::uint64_t vram = kVram + 16 * model.device_slot + 1000;  // eight cached
  const auto chunk = [&](std::uint64_t step_bytes) {
    model.steps = {{256, 150, 30}, {512, step_bytes, 30}};
    return plan(vram, kEnough, wishes_of(), model).chunk;
  };
  EXPECT_EQ(chunk(2 * model.device_slot), 512);
  EXPECT_EQ(chunk(3 * model.device_slot), 256);
}

TEST(PlanInVram, NoChunkTakesMoreThanItsActivationsMay) {
  ModelBytes model = small_model();
  model.steps = {{256, 150, 30}, {1024, kActivationBytes, 30}, {2048, kActivationBytes + 1, 30}};
  EXPECT_EQ(plan(2 * kActivationBytes, kEnough, wishes_of(7), model).chunk, 1024);
}

TEST(PlanInVram, SlotsOfBothMemoriesChangeAndTheRestStays) {
  const Budgets budgets = budgets_of(5000, 5000);
  const ModelBytes model = small_model();
  const Plan before = make_plan(model, budgets, wishes_of());
  EXPECT_EQ(before.device_cache_slots, 23u);  // (5000 - 1890) / 130
  EXPECT_EQ(before.cache_slots, 32u);         // (5000 - 1150) / 120
  Wishes wishes = wishes_of(3);
  wishes.cpu_cache_size = 1200;
  const Plan after = with_slots(before, model, budgets, wishes);
  EXPECT_EQ(after.device_cache_slots, 3u);
  EXPECT_EQ(after.device_slots, 11u);
  EXPECT_EQ(after.vram_bytes, kVram + 11 * 130);
  EXPECT_EQ(after.cache_slots, 10u);
  EXPECT_EQ(after.ram_bytes, kRam + 18 * 120);
  EXPECT_EQ(after.chunk, before.chunk);
  const Plan again = with_slots(after, model, budgets, wishes_of());  // planned, as at first
  EXPECT_EQ(again.device_slots, before.device_slots);
  EXPECT_EQ(again.slots, before.slots);
  EXPECT_EQ(with_slots(before, model, budgets, wishes_of({}, 130)).device_cache_slots, 22u);
  const auto refused = [&](const Wishes& wanted) -> std::optional<MemoryLimitError> {
    try {
      with_slots(before, model, budgets, wanted);
      return std::nullopt;
    } catch (const MemoryLimitError& error) {
      return error;
    }
  };
  EXPECT_TRUE(says(refused(wishes_of(24)), "lower max_experts to 23"));
  EXPECT_TRUE(says(refused(wishes_of({}, 3111)), "lower gpu_reserved"));
  EXPECT_TRUE(says(refused(with_cache(4000)), "lower cpu_cache_size"));
}

// DeepSeek-R1 in FP4: 12.5 GB of dense weights and head, 1.85 GB of embedding, 14,848 experts of
// 24.8 MB, and 61 layers' latents.
TEST(PlanInVram, R1On16Gb) {
  ModelBytes model;
  model.embedding = model.host_embedding = 1'850'000'000;
  model.dense = 12'500'000'000 + model.embedding;
  model.experts = 14'848;
  model.expert_slot = model.device_slot = 24'800'000;
  model.expert_bytes = model.experts * model.device_slot;
  model.experts_per_token = 8;
  model.kv_block = 61 * 64 * 576 * 2;
  model.steps = {{256, 1'200'000'000, 8'000'000}};
  model.reader = 64'000'000;
  model.load_buffer = 1'850'000'000;
  Wishes wishes;
  wishes.max_context = 4096;
  Budgets budgets{.ram_limit = 48'000'000'000,
                  .machine = {64'000'000'000, 60'000'000'000, 0},
                  .vram = 16'000'000'000};
  // 12.5 GB + 64 blocks of 4,497,408 bytes + 1.2 GB + 8 slots.
  const std::uint64_t floor = 14'186'234'112;
  const Plan r1 = make_plan(model, budgets, wishes);
  EXPECT_TRUE(r1.tiered);
  EXPECT_TRUE(r1.embedding_in_ram);
  EXPECT_EQ(r1.kv_bytes, 287'834'112u);
  EXPECT_EQ(r1.device_cache_slots, 73u);  // 1,813,765,888 bytes are left
  EXPECT_EQ(r1.vram_bytes, floor + 73 * model.device_slot);
  EXPECT_EQ(r1.slots, 1852u);  // 48 - 0.128 - 1.85 - 0.064 - 0.008 = 45.95 GB
  EXPECT_EQ(r1.cache_slots, 1836u);
  EXPECT_EQ(r1.load_bytes, 0u);
  budgets.vram = 14'000'000'000;
  const auto error = refusal(model, budgets, wishes);
  ASSERT_TRUE(error);
  EXPECT_EQ(error->needed(), floor);
  EXPECT_TRUE(says(error, "need 14.186 GB of VRAM and 14.000 GB are available")) << error->what();
  EXPECT_TRUE(says(error, "max_context to 1408"));  // 22 blocks in 101.6 MB
  wishes.max_context = 1408;
  EXPECT_EQ(make_plan(model, budgets, wishes).device_cache_slots, 0u);
}

}  // namespace
}  // namespace dsfp4::residency
