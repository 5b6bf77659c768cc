// How an expert's bytes lie in a slot: as in the files, so that direct reads land in place.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <vector>

#include "checkpoint/layout.h"
#include "ops/backend.h"

namespace dsfp4::residency {

/// Where a format has no scales.
inline constexpr std::uint64_t kNoPlace = std::numeric_limits<std::uint64_t>::max();

/// How one expert gets into a slot, and what it is there.
struct ExpertImage {
  struct Part {
    std::uint32_t file = 0;
    std::uint64_t offset = 0;  // in the file
    std::uint64_t bytes = 0;
    /// Congruent to `offset` modulo storage::kBlockBytes; no other part shares a block of the slot.
    std::uint64_t slot_offset = 0;
  };
  std::vector<Part> parts;
  /// Formats, shapes and global scales; the pointers are filled in from `places`.
  const ops::ExpertView* view = nullptr;
  /// Slot offsets of gate's data and scales, up's, down's.
  std::array<std::uint64_t, 6> places{};

  std::uint64_t bytes() const noexcept;
};

/// Adjacent tensors are one part. `view` must outlive the image.
ExpertImage expert_image(const checkpoint::MlpSource& source, const ops::ExpertView& view);

/// Slot bytes that the image takes, a multiple of storage::kBlockBytes.
std::uint64_t slot_bytes(const ExpertImage& image);

}  // namespace dsfp4::residency
