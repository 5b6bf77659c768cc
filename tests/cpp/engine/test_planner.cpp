// A plan without a GPU and without weights is the plan of a load.
#include <cstdint>
#include <optional>
#include <string>

#include <gtest/gtest.h>

#include "checkpoint/published.h"
#include "checkpoint/tiny_checkpoint.h"
#include "dsfp4/error.h"
#include "engine/engine.h"
#include "engine/planner.h"
#include "memory/account.h"
#include "memory/limits.h"
#include "ops/cuda_memory.h"

namespace dsfp4::engine {
namespace {

constexpr std::uint64_t kGb = 1'000'000'000;

LoadOptions options_for(const std::string& device, std::int64_t max_context = 4096) {
  LoadOptions options;
  options.device = device;
  options.threads = 2;
  options.max_context = max_context;
  return options;
}

std::uint64_t sum_of(const DescribedPlan& plan, Tier tier) {
  std::uint64_t bytes = 0;
  for (const PlacedRole& role : plan.roles) bytes += role.tier == tier ? role.bytes : 0;
  return bytes;
}

TEST(Planner, RolesAreAllThatAPlanTakes) {
  for (const std::string_view name : checkpoint::published_names()) {
    for (const std::uint64_t ram : {48u, 96u, 1000u}) {
      SCOPED_TRACE(std::string(name) + " " + std::to_string(ram));
      const Planner on_gpu(checkpoint::published_model(name), options_for("cuda"));
      const DescribedPlan beside = on_gpu.plan({ram * kGb, 16 * kGb}, options_for("cuda"));
      EXPECT_EQ(sum_of(beside, Tier::kVram), beside.plan.vram_bytes + ops::kCudaContextBytes);
      EXPECT_EQ(sum_of(beside, Tier::kRam), beside.plan.ram_bytes);
      EXPECT_LE(sum_of(beside, Tier::kVram), 16 * kGb);
      EXPECT_LE(sum_of(beside, Tier::kRam), ram * kGb);

      const Planner in_ram(checkpoint::published_model(name), options_for("cpu"));
      const DescribedPlan alone = in_ram.plan({ram * kGb, {}}, options_for("cpu"));
      EXPECT_EQ(sum_of(alone, Tier::kRam), alone.plan.ram_bytes);
      EXPECT_EQ(sum_of(alone, Tier::kVram), 0u);
      EXPECT_EQ(sum_of(alone, Tier::kSsd) > 0, alone.plan.tiered);
    }
  }
}

TEST(Planner, ARefusalHasTheMissingNumber) {
  const Planner planner(checkpoint::published_model("deepseek-r1-fp4"), options_for("cuda"));
  try {
    planner.plan({96 * kGb, 3 * kGb}, options_for("cuda"));
    FAIL() << "R1 does not fit into 3 GB of VRAM";
  } catch (const MemoryLimitError& error) {
    EXPECT_GT(error.needed(), error.available());
    const std::uint64_t vram = error.needed() + 3 * kGb - error.available();
    EXPECT_NO_THROW(planner.plan({96 * kGb, vram}, options_for("cuda")));
    EXPECT_THROW(planner.plan({96 * kGb, vram - 1}, options_for("cuda")), MemoryLimitError);
  }
}

TEST(Planner, DevicesAreTheProcessorAndNvidiasGpus) {
  const auto make = [](const std::string& device) {
    const Planner planner(checkpoint::published_model("deepseek-v2-lite"), options_for(device));
    planner.plan({96 * kGb, {}}, options_for(device));
  };
  EXPECT_NO_THROW(make("cpu"));
  for (const char* device : {"reference", "auto", "", "tpu"}) {
    EXPECT_THROW(make(device), ParameterError) << device;
  }
  EXPECT_THROW(make("cuda"), ParameterError);  // VRAM is not given
}

// FORMATS.md's figures: 24.8 MB an expert, 423 GB in all, of which 27 of layer 61 are not needed.
TEST(Planner, R1IsAsLargeAsPublished) {
  const Planner planner(checkpoint::published_model("deepseek-r1-fp4"), options_for("cuda"));
  EXPECT_EQ(planner.experts(), 58u * 256);
  // Three matrices of 7168 x 2048, of half a byte and a scale for every 16 values.
  EXPECT_EQ(planner.expert_bytes(), 3u * 7168 * 2048 * 9 / 16);
  EXPECT_NEAR(static_cast<double>(planner.weight_bytes()) * 1e-9, 396.7, 0.1);
  EXPECT_NEAR(static_cast<double>(planner.unneeded_bytes()) * 1e-9, 26.9, 0.1);
}

// From a folder's headers, on a machine where nothing else runs: as much as a load takes there.
TEST(Planner, IsThePlanOfALoad) {
  const testing::ScratchFolder folder;
  testing::make_tiny_checkpoint(testing::TinyKind::kNvfp4).write(folder.path());
  LoadOptions options = options_for("cpu", 64);
  const DescribedMachine described{8 * kGb, {}};
  Machine machine;
  machine.memory = [&] {
    return memory::MachineMemory{.total = described.ram, .available = described.ram, .process = 0};
  };
  memory::Account account;
  machine.account = &account;
  const Planner planner(folder.path(), options);
  for (const std::optional<double> cache : {std::optional<double>(), std::optional(0.0)}) {
    options.strategy.cpu_cache_size = cache;
    const residency::Plan plan = planner.plan(described, options).plan;
    const Engine engine(folder.path(), options, machine);
    const ModelStats stats = engine.stats();
    EXPECT_EQ(stats.tiered, plan.tiered);
    EXPECT_EQ(stats.slots, plan.slots);
    EXPECT_EQ(stats.cache_slots, plan.cache_slots);
    EXPECT_EQ(stats.reserved_bytes, plan.ram_bytes);
    EXPECT_EQ(plan.tiered, cache.has_value());
  }
}

}  // namespace
}  // namespace dsfp4::engine
