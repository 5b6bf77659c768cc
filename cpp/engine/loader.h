// Brings a checkpoint's weights into memory, byte for byte as they are stored.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>

#include "checkpoint/config.h"
#include "memory/arena.h"
#include "model/weights.h"

namespace dsfp4::engine {

struct LoadedWeights {
  memory::Arena arena;  // what `weights` points into
  model::ModelWeights weights;
  std::uint64_t weight_bytes;  // stored bytes of the matrices
};

/// Throws CheckpointError, IoError, and MemoryLimitError when the weights need more than
/// available_memory().
LoadedWeights load_weights(const std::filesystem::path& folder,
                           const checkpoint::ModelConfig& config,
                           const std::function<void(std::uint64_t, std::uint64_t)>& progress);

}  // namespace dsfp4::engine
