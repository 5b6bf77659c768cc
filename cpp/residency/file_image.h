// How weights from files lie in a slot of memory: as in the files, so that direct reads land in
// place.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <vector>

#include "checkpoint/layout.h"
#include "format/weight.h"
#include "ops/views.h"
#include "residency/dense_formats.h"
#include "storage/reader.h"

namespace dsfp4::residency {

/// An expert in host memory, for those who write it there.
using ExpertBytes = ops::ExpertViewOf<format::WeightViewOf<std::byte*>>;

/// What is to be read into a slot, and how much room that takes.
struct FileImage {
  struct Part {
    std::uint32_t file = 0;
    std::uint64_t offset = 0;  // in the file
    std::uint64_t bytes = 0;
    /// Congruent to `offset` modulo storage::kBlockBytes; no other part shares a block of the slot.
    std::uint64_t slot_offset = 0;
  };
  std::vector<Part> parts;
  /// A multiple of storage::kBlockBytes.
  std::uint64_t slot_bytes = 0;

  /// Of the parts.
  std::uint64_t bytes() const noexcept;
  std::vector<storage::Extent> extents(std::byte* slot) const;
};

/// Where data and block scales of a matrix lie in a slot.
struct MatrixPlace {
  static constexpr std::uint64_t kNone = std::numeric_limits<std::uint64_t>::max();
  std::uint64_t data = kNone;
  std::uint64_t scales = kNone;  // kNone where the format has none

  /// The matrix of that format and shape in a slot of bytes, or of bytes that are only read.
  template <typename Bytes>
  format::WeightViewOf<Bytes*> in(Bytes* slot, const ops::WeightView& shape) const noexcept {
    return {shape.format,
            shape.rows,
            shape.cols,
            slot + data,
            scales == kNone ? nullptr : slot + scales,
            shape.global_scale};
  }
};

/// A matrix, and the view of it that is to point to where it lies.
struct FileMatrix {
  const checkpoint::WeightSource* source = nullptr;
  ops::WeightView* view = nullptr;
  MatrixPlace place;
  std::optional<DenseRole> role = std::nullopt;  // none: it is never converted

  /// As published, in a slot.
  format::WeightView published_in(const std::byte* slot) const noexcept;
  /// Its format where those of the roles are `formats`.
  format::WeightFormat format_in(const DenseFormats& formats) const;
};

/// Matrices that go, and lie, together.
struct FileGroup {
  FileImage files;
  std::vector<FileMatrix> matrices;

  /// Points the views into a slot.
  void point(const std::byte* slot) const noexcept;
};

/// The group of these matrices, all of which are present; fills in their places.
FileGroup file_group(std::vector<FileMatrix> matrices);

/// Adjacent tensors are one part. places[i] becomes the place of matrices[i], all of which are
/// present.
FileImage file_image(std::span<const checkpoint::WeightSource* const> matrices,
                     std::span<MatrixPlace> places);

/// How one expert gets into a slot, and what it is there.
struct ExpertImage {
  FileImage files;
  /// Formats, shapes and global scales; the pointers come from `places`.
  const ops::ExpertView* view = nullptr;
  std::array<MatrixPlace, 3> places;  // gate, up, down

  template <typename Bytes>
  ops::ExpertViewOf<format::WeightViewOf<Bytes*>> view_in(Bytes* slot) const noexcept {
    return {places[0].in(slot, view->gate_proj), places[1].in(slot, view->up_proj),
            places[2].in(slot, view->down_proj)};
  }
};

/// `view` must outlive the image.
ExpertImage expert_image(const checkpoint::MlpSource& source, const ops::ExpertView& view);

}  // namespace dsfp4::residency
