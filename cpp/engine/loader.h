// Brings a checkpoint's weights into memory, byte for byte as they are stored.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <vector>

#include "checkpoint/config.h"
#include "memory/arena.h"
#include "model/weights.h"
#include "residency/expert_image.h"
#include "storage/reader.h"

namespace dsfp4::engine {

struct LoadedWeights {
  memory::Arena arena;  // what `weights` points into
  model::ModelWeights weights;
  std::uint64_t weight_bytes;  // stored bytes of the matrices, experts too
  /// Of a model whose experts stay in the files: what ExpertStore needs. Else empty.
  std::vector<residency::ExpertImage> images;
  std::unique_ptr<storage::Reader> reader;
  std::size_t experts = 0;        // in all layers
  std::uint64_t fingerprint = 0;  // of the tensors' names, places and sizes
};

/// What load_weights() would take, from the headers alone.
struct WeightSizes {
  std::size_t dense_bytes = 0;   // of an arena that holds everything but the routed experts
  std::size_t expert_bytes = 0;  // and of the routed experts in it
  std::size_t slot_bytes = 0;    // of one routed expert in an ExpertStore; 0 if there are none
  std::size_t experts = 0;       // in all layers
};
WeightSizes weight_sizes(const std::filesystem::path& folder, const checkpoint::ModelConfig& config);

/// Throws CheckpointError, IoError, and MemoryLimitError when the weights need more than
/// available_memory().
/// With `experts_in_files`, the routed experts' matrices are not loaded: their views have formats
/// and scales but no data.
LoadedWeights load_weights(const std::filesystem::path& folder,
                           const checkpoint::ModelConfig& config, bool experts_in_files,
                           const storage::ReaderOptions& reading,
                           const std::function<void(std::uint64_t, std::uint64_t)>& progress);

}  // namespace dsfp4::engine
