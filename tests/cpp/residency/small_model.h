// A small model over VRAM, RAM and the files, in numbers that are worked out by hand.
#pragma once

#include <cstdint>
#include <optional>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "residency/plan.h"
#include "residency/vram_budgets.h"

namespace dsfp4::residency {

inline ModelBytes small_model() {
  ModelBytes model;
  model.dense = 600;
  model.embedding = 100;
  model.host_embedding = 110;
  model.experts = 100;
  model.expert_bytes = 10'000;
  model.expert_slot = 120;
  model.device_slot = 130;
  model.experts_per_token = 4;
  model.moe_layers = 2;
  model.kv_block = 50;
  model.steps = {{256, 150, 30}};
  model.reader = 50;
  model.load_buffer = 700;
  return model;
}

// With 256 tokens, 4 blocks, 200 bytes.
inline constexpr std::uint64_t kWhole = 600 + 10'000 + 200 + 150;       // of VRAM
inline constexpr std::uint64_t kVram = 600 - 100 + 200 + 150;           // but slots
inline constexpr std::uint64_t kVramFloor = kVram + kDeviceRing * 130;  // 1890
inline constexpr std::uint64_t kRam = 110 + 50 + 30;                    // but slots
inline constexpr std::uint64_t kRamFloor = kRam + 8 * 120;              // two layers' choices: 1150

inline Wishes wishes_of(std::optional<std::uint64_t> max_experts = {},
                        std::uint64_t gpu_reserved = 0) {
  Wishes wishes;
  wishes.max_context = 256;
  wishes.max_experts = max_experts;
  wishes.gpu_reserved = gpu_reserved;
  return wishes;
}

inline Plan plan(std::uint64_t vram, std::uint64_t ram = kEnough,
                 const Wishes& wishes = wishes_of(), const ModelBytes& model = small_model()) {
  return make_plan(model, budgets_of(vram, ram), wishes);
}

// Checks that the model loads with `vram` bytes, but not with one less; returns that refusal.
inline std::optional<MemoryLimitError> floor_is(std::uint64_t vram,
                                                const Wishes& wishes = wishes_of(),
                                                const ModelBytes& model = small_model()) {
  EXPECT_FALSE(refusal(model, budgets_of(vram), wishes));
  const auto error = refusal(model, budgets_of(vram - 1), wishes);
  EXPECT_TRUE(says(error, "of VRAM"));
  EXPECT_EQ(error ? error->needed() : 0, vram);
  EXPECT_EQ(error ? error->available() : 0, vram - 1);
  EXPECT_TRUE(says(error, "raise memory_limit"));
  EXPECT_TRUE(says(error, "device cpu leaves on the SSD what does not fit"));
  return error;
}

}  // namespace dsfp4::residency
