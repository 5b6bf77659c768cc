// Budgets of VRAM and RAM, and what a plan refuses, for the tests of plans over both.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "dsfp4/error.h"
#include "memory/limits.h"
#include "residency/plan.h"

namespace dsfp4::residency {

inline constexpr std::uint64_t kUnbounded = std::numeric_limits<std::uint64_t>::max();
inline constexpr std::uint64_t kEnough = 1'000'000;  // of either memory
inline constexpr std::uint64_t kProcess = 3000;

// So much VRAM, and so much RAM beside what the process has and what is not counted.
inline Budgets budgets_of(std::uint64_t vram, std::uint64_t ram = kEnough) {
  return {.ram_limit = kProcess + memory::kUncountedBytes + ram,
          .machine = {kUnbounded, kUnbounded, kProcess},
          .vram = vram};
}

inline std::optional<MemoryLimitError> refusal(const ModelBytes& model, const Budgets& budgets,
                                               const Wishes& wishes) {
  try {
    make_plan(model, budgets, wishes);
    return std::nullopt;
  } catch (const MemoryLimitError& error) {
    return error;
  }
}

inline bool says(const std::optional<MemoryLimitError>& error, const std::string& words) {
  return error && std::string(error->what()).find(words) != std::string::npos;
}

}  // namespace dsfp4::residency
