// Scratch matrices from an arena that was taken at load.
#pragma once

#include <cstdint>

#include "memory/arena.h"
#include "ops/views.h"

namespace dsfp4::ops {

/// A matrix of scratch, not initialised.
inline Matrix scratch_matrix(memory::Arena& arena, std::int64_t rows, std::int64_t cols) {
  return {arena.take_array<float>(static_cast<std::size_t>(rows * cols)), rows, cols, cols};
}

/// Arena bytes of a matrix of `values` values.
inline std::size_t scratch_bytes(std::int64_t values) {
  return memory::Arena::padded(static_cast<std::size_t>(values) * sizeof(float));
}

/// Gives back what was taken from an arena in this scope.
class ScratchScope {
 public:
  explicit ScratchScope(memory::Arena& arena) : arena_(arena), mark_(arena.used()) {}
  ~ScratchScope() { arena_.release(mark_); }
  ScratchScope(const ScratchScope&) = delete;
  ScratchScope& operator=(const ScratchScope&) = delete;

 private:
  memory::Arena& arena_;
  std::size_t mark_;
};

}  // namespace dsfp4::ops
