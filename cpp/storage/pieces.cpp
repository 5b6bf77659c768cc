#include "storage/pieces.h"

#include <algorithm>
#include <cstdint>

namespace dsfp4::storage {
namespace {

constexpr std::uint64_t kMask = kBlockBytes - 1;
constexpr std::uint64_t kSmall = 64 << 10;  // below, a read of its own costs more than a copy

std::uint64_t down(std::uint64_t at) { return at & ~kMask; }
std::uint64_t up(std::uint64_t at) { return (at + kMask) & ~kMask; }

// Where byte `at` of the file belongs; with slack that may lie before the extent.
std::byte* address_of(const Extent& extent, std::uint64_t at) {
  return extent.destination +
         (static_cast<std::ptrdiff_t>(at) - static_cast<std::ptrdiff_t>(extent.offset));
}

// A range of a file that goes through staging.
struct Staged {
  std::uint32_t file;
  bool direct;
  Fragment fragment;
};

class Planner {
 public:
  explicit Planner(std::uint64_t piece_bytes) : piece_bytes_(piece_bytes) {}

  void add(const Extent& extent, bool direct) {
    if (!direct) {
      if (extent.bytes < kSmall) {
        stage(extent, false, extent.offset, extent.offset + extent.bytes);
      } else {
        in_place(extent, extent.offset, extent.offset + extent.bytes);
      }
      return;
    }
    const std::uint64_t end = extent.offset + extent.bytes;
    const auto address = reinterpret_cast<std::uintptr_t>(extent.destination);
    const bool congruent = ((address ^ extent.offset) & kMask) == 0;
    if (congruent && extent.slack) {
      in_place(extent, down(extent.offset), up(end));
    } else if (congruent && extent.bytes >= kSmall) {
      const std::uint64_t first = up(extent.offset);
      const std::uint64_t last = down(end);
      stage(extent, true, extent.offset, first);
      in_place(extent, first, last);
      stage(extent, true, last, end);
    } else {
      stage(extent, true, extent.offset, end);
    }
  }

  Plan finish() {
    std::ranges::sort(staged_, [](const Staged& a, const Staged& b) {
      return a.file != b.file ? a.file < b.file : a.fragment.offset < b.fragment.offset;
    });
    for (std::size_t i = 0; i < staged_.size();) i = staged_piece(i);
    std::ranges::stable_sort(plan_.pieces, [](const Piece& a, const Piece& b) {
      return a.file != b.file ? a.file < b.file : a.offset < b.offset;
    });
    return std::move(plan_);
  }

 private:
  // Reads [begin, end) of the file, of which the extent's part is needed, to where it belongs.
  void in_place(const Extent& extent, std::uint64_t begin, std::uint64_t end) {
    const std::uint64_t extent_end = extent.offset + extent.bytes;
    for (std::uint64_t at = begin; at < end;) {
      const std::uint64_t next = std::min(end, split_after(at));
      const std::uint64_t first = std::max(at, extent.offset);
      const std::uint64_t last = std::min(next, extent_end);
      plan_.pieces.push_back({.offset = at,
                              .first_needed = first,
                              .destination = address_of(extent, at),
                              .bytes = static_cast<std::uint32_t>(next - at),
                              .needed = static_cast<std::uint32_t>(last - at),
                              .useful = static_cast<std::uint32_t>(last - first),
                              .file = extent.file});
      at = next;
    }
  }

  // Splits fall on multiples of the piece size, so that pieces after the first are whole.
  std::uint64_t split_after(std::uint64_t at) const {
    return (at / piece_bytes_ + 1) * piece_bytes_;
  }

  void stage(const Extent& extent, bool direct, std::uint64_t begin, std::uint64_t end) {
    for (std::uint64_t at = begin; at < end;) {
      const std::uint64_t next = std::min(end, split_after(at));
      staged_.push_back({extent.file, direct, {at, next - at, address_of(extent, at)}});
      at = next;
    }
  }

  // One piece out of the ranges from `i` on that lie close together; returns the first that does
  // not.
  std::size_t staged_piece(std::size_t i) {
    const Staged& first = staged_[i];
    const std::uint64_t begin = first.direct ? down(first.fragment.offset) : first.fragment.offset;
    const std::uint64_t most = first.direct ? split_after(begin) : begin + piece_bytes_;
    Piece piece{.offset = begin,
                .first_needed = first.fragment.offset,
                .file = first.file,
                .first_fragment = static_cast<std::uint32_t>(plan_.fragments.size())};
    std::uint64_t end = begin;
    for (; i < staged_.size(); ++i) {
      const Staged& next = staged_[i];
      const std::uint64_t next_end = next.fragment.offset + next.fragment.bytes;
      if (next.file != piece.file || next_end > most) break;
      if (end != begin && next.fragment.offset > up(end) + kBlockBytes) break;
      plan_.fragments.push_back(next.fragment);
      ++piece.fragments;
      piece.useful += static_cast<std::uint32_t>(next.fragment.bytes);
      end = std::max(end, next_end);
    }
    piece.needed = static_cast<std::uint32_t>(end - begin);
    piece.bytes = static_cast<std::uint32_t>((first.direct ? up(end) : end) - begin);
    plan_.pieces.push_back(piece);
    return i;
  }

  std::uint64_t piece_bytes_;
  std::vector<Staged> staged_;
  Plan plan_;
};

struct Source {
  Extent extent;
  bool direct;
};

// In the order of the files; extents that continue one another in file and memory become one.
std::vector<Source> joined(std::span<const Extent> extents, const std::vector<bool>& direct) {
  std::vector<Source> sorted;
  sorted.reserve(extents.size());
  for (std::size_t i = 0; i < extents.size(); ++i) {
    if (extents[i].bytes > 0) sorted.push_back({extents[i], direct[i]});
  }
  std::ranges::stable_sort(sorted, [](const Source& a, const Source& b) {
    return a.extent.file != b.extent.file ? a.extent.file < b.extent.file
                                          : a.extent.offset < b.extent.offset;
  });
  std::size_t kept = 0;
  for (std::size_t i = 1; i < sorted.size(); ++i) {
    Extent& last = sorted[kept].extent;
    const Extent& next = sorted[i].extent;
    if (last.file == next.file && last.offset + last.bytes == next.offset &&
        last.destination + last.bytes == next.destination && last.slack == next.slack) {
      last.bytes += next.bytes;
    } else {
      sorted[++kept] = sorted[i];
    }
  }
  sorted.resize(std::min(sorted.size(), kept + 1));
  return sorted;
}

}  // namespace

Plan plan_pieces(std::span<const Extent> extents, const std::vector<bool>& direct,
                 std::uint64_t piece_bytes) {
  Planner planner(piece_bytes);
  for (const Source& source : joined(extents, direct)) planner.add(source.extent, source.direct);
  return planner.finish();
}

}  // namespace dsfp4::storage
