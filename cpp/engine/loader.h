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
#include "engine/weight_check.h"
#include "memory/arena.h"
#include "model/weights.h"
#include "ops/backend.h"
#include "residency/file_image.h"
#include "residency/layer_stream.h"
#include "residency/plan.h"
#include "storage/reader.h"

namespace dsfp4::engine {

/// Bytes that there are to load, from the headers alone.
struct WeightSizes {
  std::size_t dense_bytes = 0;   // of an arena that holds everything but the routed experts
  std::size_t expert_bytes = 0;  // and of the routed experts in it
  std::size_t slot_bytes = 0;    // of one routed expert in an ExpertStore; 0 if there are none
  std::size_t experts = 0;       // in all layers
  /// Of dense_bytes, what goes where a layer is streamed, and the size of a buffer for one.
  std::vector<std::uint64_t> layer_bytes;
  std::size_t layer_slot_bytes = 0;
  std::uint64_t staging = 0;      // of the reader
  std::uint64_t load_buffer = 0;  // RAM that all pass through to memory that the host cannot touch
  ops::WidestWeights widest;
  std::vector<ops::ExpertView> layer_experts;  // of the last layer, without data
};

struct LoadedWeights {
  std::shared_ptr<memory::Arena> arena;  // what `weights` points into
  model::ModelWeights weights;
  std::uint64_t weight_bytes;  // stored bytes of the matrices, experts too
  WeightSizes sizes;
  // Of a model of which a part stays in the files: how that is read and checked later. Else empty.
  std::vector<residency::ExpertImage> images;      // for the ExpertStore
  std::vector<residency::StreamedLayer> streamed;  // for the LayerStream
  checkpoint::ModelLayout layout;
  std::unique_ptr<WeightCheck> check;
  std::unique_ptr<storage::Reader> reader;
  std::uint64_t fingerprint = 0;  // of the tensors' names, places and sizes
};

struct LoadWeightsOptions {
  storage::ReaderOptions reader;
  /// That check hashes where the checkpoint has them, at least 1.
  int threads = 1;
  /// Called while weights are read, in bytes.
  std::function<void(std::uint64_t done, std::uint64_t total)> progress;
  /// Asked while weights are read and checked; what it throws ends the load.
  Poll poll;
  /// Called before anything is taken. The views of what stays in the files have formats and scales
  /// but no data. An exception thrown by it ends the load. None: everything is loaded.
  std::function<residency::Plan(const WeightSizes& sizes)> plan;
};

/// Brings the weights into the backend's memory. Throws CheckpointError, IoError, and
/// MemoryLimitError when the system does not have the memory.
LoadedWeights load_weights(const std::filesystem::path& folder,
                           const checkpoint::ModelConfig& config, ops::Backend& backend,
                           const LoadWeightsOptions& options);

}  // namespace dsfp4::engine
