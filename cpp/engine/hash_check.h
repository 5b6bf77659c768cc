// Weights that were read, against the checksum sidecar of their folder.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "checkpoint/catalogue.h"

namespace dsfp4::engine {

/// A whole tensor as it was read.
struct ReadTensor {
  const checkpoint::TensorInfo* tensor = nullptr;
  const std::byte* bytes = nullptr;
};

/// Does nothing where the folder has no sidecar. Throws CheckpointError that names file and tensor
/// for the first whose bytes are not those that were hashed. `threads` >= 1 hash at the same time.
void check_hashes(const checkpoint::Catalogue& catalogue, std::span<const ReadTensor> tensors,
                  int threads);

}  // namespace dsfp4::engine
