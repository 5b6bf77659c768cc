// Whether weights that were read are what they should be: checksums and block scales.
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <vector>

#include "base/poll.h"
#include "base/thread_pool.h"
#include "checkpoint/catalogue.h"
#include "checkpoint/hashes.h"
#include "checkpoint/layout.h"
#include "format/weight.h"

namespace dsfp4::engine {

/// A whole tensor as it was read.
struct ReadTensor {
  const checkpoint::TensorInfo* tensor = nullptr;
  const std::byte* bytes = nullptr;
  /// If these are block scales: their matrix, and perhaps where else it lies.
  std::optional<format::WeightView> scales_of = std::nullopt;
  /// Its values decide for a whole layer (a norm, the router): each must be finite.
  bool finite = false;
};

/// Adds the tensors of a matrix that lies where `view` says.
void add_tensors(const checkpoint::WeightSource& source, const format::WeightView& view,
                 bool finite, std::vector<ReadTensor>& tensors);

/// Owns the catalogue of a checkpoint. May be used from several threads at once.
class WeightCheck {
 public:
  /// `threads` >= 1 check at the same time. Throws CheckpointError for a malformed sidecar.
  WeightCheck(checkpoint::Catalogue catalogue, int threads);
  WeightCheck(const WeightCheck&) = delete;
  WeightCheck& operator=(const WeightCheck&) = delete;

  const checkpoint::Catalogue& catalogue() const noexcept { return catalogue_; }
  /// Throws CheckpointError, naming file and tensor, for one whose bytes are not those of the
  /// checksum sidecar (if the folder has one), or that has a block scale, or a value that must be
  /// finite, that is NaN or infinite. `poll` is asked between groups of tensors; what it throws
  /// leaves check().
  void check(std::span<const ReadTensor> tensors, const Poll& poll = {});

 private:
  void check_one(const ReadTensor& read) const;
  void check_finite(const ReadTensor& read) const;

  checkpoint::Catalogue catalogue_;
  std::optional<checkpoint::TensorHashes> hashes_;
  ThreadPool pool_;
};

}  // namespace dsfp4::engine
