// A model over VRAM, RAM and the files: what holds for models of every shape.
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <optional>
#include <random>
#include <string>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "memory/limits.h"
#include "residency/plan.h"
#include "residency/vram_budgets.h"

namespace dsfp4::residency {
namespace {

class AnyModel {
 public:
  explicit AnyModel(std::uint64_t seed) : random_(seed) {
    const std::uint64_t scale = std::uint64_t{1} << number(10, 30);
    model.dense = number(1, scale);
    if (number(0, 3) > 0) {
      model.embedding = number(1, model.dense);
      model.host_embedding = model.embedding + number(0, 4096);
    }
    model.experts = number(1, 600);
    model.experts_per_token = number(1, std::min<std::uint64_t>(8, model.experts));
    model.expert_slot = number(1, scale / 10);
    model.device_slot = model.expert_slot + number(0, 512);
    model.expert_bytes = model.experts * model.device_slot;
    model.kv_block = number(1, scale / 20);
    model.reader = number(0, scale / 20);
    model.load_buffer = number(0, scale);
    wishes.max_context = static_cast<std::int64_t>(number(1, 5000));
    const std::uint64_t row = number(1, 800'000);
    for (std::int64_t rows = 256; rows <= 4096; rows *= 2) {
      const std::int64_t chunk = std::min(rows, wishes.max_context);
      if (!model.steps.empty() && chunk == model.steps.back().rows) break;
      const auto count = static_cast<std::uint64_t>(chunk);
      model.steps.push_back({chunk, row * count, number(0, 1000) * count});
    }
    const std::uint64_t whole =
        model.dense + model.expert_bytes + kv() + model.steps.front().bytes + scale;
    vram = number(0, number(0, 1) == 0 ? whole : whole - model.expert_bytes);
    ram = number(0, number(0, 1) == 0 ? whole : whole / 4);
    if (number(0, 2) == 0) wishes.max_experts = number(0, model.experts + 3);
    if (number(0, 2) == 0) wishes.gpu_reserved = number(0, vram / 4);
    if (number(0, 3) == 0) wishes.cpu_cache_size = number(0, ram);
  }

  std::uint64_t number(std::uint64_t least, std::uint64_t most) {
    return std::uniform_int_distribution<std::uint64_t>(least, most)(random_);
  }
  std::uint64_t kv() const {
    return static_cast<std::uint64_t>((wishes.max_context + 63) / 64) * model.kv_block;
  }

  ModelBytes model;
  Wishes wishes;
  std::uint64_t vram = 0;
  std::uint64_t ram = 0;

 private:
  std::mt19937_64 random_;
};

constexpr std::uint64_t kSeeds = 4000;

// The sums that the plan should have, from its decisions alone.
void check_sums(const AnyModel& any, const Plan& plan) {
  const ModelBytes& model = any.model;
  const auto step = std::ranges::find(model.steps, plan.chunk, &ModelBytes::Step::rows);
  ASSERT_NE(step, model.steps.end());
  std::uint64_t vram = model.dense + any.kv() + step->bytes;
  std::uint64_t ram = 0;
  std::uint64_t loading = model.reader + model.load_buffer;
  if (plan.tiered) {
    vram += plan.device_slots * model.device_slot - (plan.embedding_in_ram ? model.embedding : 0);
    ram += plan.embedding_in_ram ? model.host_embedding : 0;
    loading += ram;
    ram += model.reader + plan.slots * model.expert_slot + step->host_bytes;
  } else {
    vram += model.expert_bytes;
  }
  ASSERT_EQ(plan.vram_bytes, vram);
  ASSERT_LE(vram + any.wishes.gpu_reserved, any.vram);
  ASSERT_EQ(plan.ram_bytes, ram);
  ASSERT_EQ(plan.ram_bytes + plan.load_bytes, std::max(ram, loading));
  ASSERT_LE(plan.ram_bytes + plan.load_bytes, any.ram);
  if (!plan.tiered) return;
  ASSERT_EQ(plan.device_slots, plan.device_cache_slots + kDeviceRing);
  ASSERT_LE(plan.device_cache_slots,
            std::min(any.wishes.max_experts.value_or(model.experts), model.experts));
  ASSERT_LE(plan.cache_slots, model.experts);
  ASSERT_GT(plan.slots, plan.cache_slots);
  ASSERT_EQ(plan.embedding_in_ram, model.embedding > 0);
}

TEST(PlanInVramProperty, NeverMoreThanTheBudgets) {
  std::size_t tiers = 0;
  std::size_t whole = 0;
  for (std::uint64_t seed = 0; seed < kSeeds; ++seed) {
    const AnyModel any(seed);
    if (refusal(any.model, budgets_of(any.vram, any.ram), any.wishes)) continue;
    const Plan made = make_plan(any.model, budgets_of(any.vram, any.ram), any.wishes);
    ASSERT_NO_FATAL_FAILURE(check_sums(any, made)) << seed;
    ++(made.tiered ? tiers : whole);
  }
  EXPECT_GT(tiers, kSeeds / 10);
  EXPECT_GT(whole, kSeeds / 200);
}

// The number that a refusal says after `words`.
std::optional<std::int64_t> number_after(const MemoryLimitError& error, const std::string& words) {
  const std::string text = error.what();
  const std::size_t at = text.find(words);
  if (at == text.npos) return std::nullopt;
  return std::strtoll(text.c_str() + at + words.size(), nullptr, 10);
}

TEST(PlanInVramProperty, ARefusalsNumberIsExactAndItsAdviceLoads) {
  std::size_t of_vram = 0;
  std::size_t of_ram = 0;
  std::size_t advised = 0;
  for (std::uint64_t seed = 0; seed < kSeeds; ++seed) {
    const AnyModel any(seed);
    Budgets budgets = budgets_of(any.vram, any.ram);
    const auto error = refusal(any.model, budgets, any.wishes);
    if (!error) continue;
    if (!says(error, "of VRAM")) {
      budgets.ram_limit = error->needed();
      ASSERT_FALSE(refusal(any.model, budgets, any.wishes)) << seed;
      --budgets.ram_limit;
      ASSERT_TRUE(refusal(any.model, budgets, any.wishes)) << seed;
      ++of_ram;
      continue;
    }
    budgets = budgets_of(any.vram, kUnbounded / 2);
    Wishes lower = any.wishes;
    const auto context = number_after(*error, "max_context to ");
    const auto experts = number_after(*error, "max_experts to ");
    if (context) lower.max_context = *context;
    if (experts) lower.max_experts = static_cast<std::uint64_t>(*experts);
    if (context || experts) {
      ASSERT_LE(lower.max_context, any.wishes.max_context) << seed;
      ASSERT_FALSE(refusal(any.model, budgets, lower)) << seed << error->what();
      ++advised;
    }
    budgets.vram = error->needed();
    ASSERT_FALSE(refusal(any.model, budgets, any.wishes)) << seed;
    --*budgets.vram;
    ASSERT_TRUE(says(refusal(any.model, budgets, any.wishes), "of VRAM")) << seed;
    ++of_vram;
  }
  EXPECT_GT(of_vram, kSeeds / 10);
  EXPECT_GT(of_ram, kSeeds / 50);
  EXPECT_GT(advised, kSeeds / 50);
}

}  // namespace
}  // namespace dsfp4::residency
