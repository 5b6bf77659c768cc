// Brings a checkpoint's weights into memory, byte for byte as they are stored.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>

#include "checkpoint/config.h"
#include "memory/arena.h"
#include "model/weights.h"
#include "ops/backend.h"
#include "storage/reader.h"

namespace dsfp4::engine {

struct LoadedWeights {
  memory::Arena arena;  // what `weights` points into
  model::ModelWeights weights;
  std::uint64_t weight_bytes;  // stored bytes of the matrices
};

/// RAM through which weights pass to memory that the host cannot touch; more for a larger matrix.
inline constexpr std::size_t kLoadBuffer = std::size_t{512} << 20;

struct LoadWeightsOptions {
  storage::ReaderOptions reader;
  /// That check hashes where the checkpoint has them, at least 1.
  int threads = 1;
  /// Called while weights are read, in bytes.
  std::function<void(std::uint64_t done, std::uint64_t total)> progress;
  /// Called with what is about to be taken, in bytes; an exception thrown by it ends the load.
  std::function<void(std::uint64_t weights, std::uint64_t staging)> before_taking;
};

/// Brings the weights into the backend's memory. Throws CheckpointError, IoError, and
/// MemoryLimitError when the system does not have the memory.
LoadedWeights load_weights(const std::filesystem::path& folder,
                           const checkpoint::ModelConfig& config, ops::Backend& backend,
                           const LoadWeightsOptions& options);

}  // namespace dsfp4::engine
