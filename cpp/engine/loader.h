// Brings a checkpoint's weights into memory, byte for byte as they are stored.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <vector>

#include "base/poll.h"
#include "checkpoint/config.h"
#include "checkpoint/layout.h"
#include "engine/placement.h"
#include "engine/weight_check.h"
#include "memory/arena.h"
#include "model/weights.h"
#include "ops/ops.h"
#include "residency/device_layers.h"
#include "residency/file_image.h"
#include "residency/layer_stream.h"
#include "residency/plan.h"
#include "storage/reader.h"

namespace dsfp4::engine {

struct LoadedWeights {
  // The memory of `weights`: the device's, and RAM for plan.embedding_in_ram (else null).
  std::shared_ptr<memory::Arena> arena;
  std::shared_ptr<memory::Arena> host_arena;
  std::shared_ptr<memory::Arena> staging_arena;     // of the next, else null
  std::vector<residency::StagedLayer> staged = {};  // for the DeviceLayers
  model::ModelWeights weights;
  std::uint64_t weight_bytes = 0;  // stored bytes of the matrices, experts too
  WeightSizes sizes;
  // Of a model of which a part stays in the files: how that is read and checked later. Else empty.
  std::vector<residency::ExpertImage> images;      // for the ExpertStore
  std::vector<residency::StreamedLayer> streamed;  // for the LayerStream
  std::unique_ptr<checkpoint::ModelLayout> layout;
  std::unique_ptr<WeightCheck> check;
  std::unique_ptr<storage::Reader> reader;
  std::uint64_t fingerprint = 0;  // of the tensors' names, places and sizes
};

struct LoadWeightsOptions {
  storage::ReaderOptions reader;
  /// That check hashes where the checkpoint has them, and convert weights; at least 1.
  int threads = 1;
  /// Called while weights are read, in bytes.
  std::function<void(std::uint64_t done, std::uint64_t total)> progress;
  /// Asked while weights are read, checked and converted; what it throws ends the load.
  Poll poll;
  /// Formats of dense weights that `plan` may choose from, at least one; without it the first is
  /// taken.
  std::vector<residency::DenseFormats> formats = {{}};
  /// Called before anything is taken. The views of what stays in the files have formats and scales
  /// but no data. An exception thrown by it ends the load. None: everything is loaded.
  std::function<residency::Plan(const WeightSizes& sizes)> plan;
};

/// Brings the weights into the device's memory, or where the plan says. Throws CheckpointError,
/// IoError, and MemoryLimitError when the system does not have the memory.
LoadedWeights load_weights(const std::filesystem::path& folder,
                           const checkpoint::ModelConfig& config, ops::Device& device,
                           const LoadWeightsOptions& options);

}  // namespace dsfp4::engine
