// Plans the reads of a request: extents are aligned outward, adjacent ones merged, large ones
// split.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "storage/reader.h"

namespace dsfp4::storage {

/// Bytes to copy out of a staging buffer.
struct Fragment {
  std::uint64_t offset = 0;  // in the file
  std::uint64_t bytes = 0;
  std::byte* destination = nullptr;
};

/// One read of the system: `bytes` bytes at `offset`, in place or into a staging buffer.
struct Piece {
  std::uint64_t offset = 0;
  std::uint64_t first_needed = 0;    // file offset of the first byte that was asked for
  std::byte* destination = nullptr;  // null: into staging
  std::uint32_t bytes = 0;           // at most 1 GiB
  std::uint32_t needed = 0;          // so many bytes of it must arrive
  std::uint32_t useful = 0;          // bytes that were asked for
  std::uint32_t file = 0;
  std::uint32_t first_fragment = 0;  // of those that are copied out of staging
  std::uint32_t fragments = 0;
};

struct Plan {
  std::vector<Piece> pieces;  // by file and offset
  std::vector<Fragment> fragments;
};

/// The reads of `extents`, of at most `piece_bytes` bytes each (a multiple of kBlockBytes, at most
/// 1 GiB). `direct` says for each extent whether its file is read directly; if so, reads are
/// aligned to kBlockBytes in file and memory. Without, only small extents go through staging, to
/// share reads.
Plan plan_pieces(std::span<const Extent> extents, const std::vector<bool>& direct,
                 std::uint64_t piece_bytes);

}  // namespace dsfp4::storage
