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

/// Brings the weights into the backend's memory. Throws CheckpointError, IoError, and
/// MemoryLimitError when they need more than there is. `threads` read at the same time.
LoadedWeights load_weights(const std::filesystem::path& folder,
                           const checkpoint::ModelConfig& config, ops::Backend& backend,
                           int threads,
                           const std::function<void(std::uint64_t, std::uint64_t)>& progress);

}  // namespace dsfp4::engine
