#include "residency/file_image.h"

#include <algorithm>
#include <utility>

#include "memory/slot_pool.h"

namespace dsfp4::residency {
namespace {

static_assert(memory::PhasedLayout::kBlock == storage::kBlockBytes);

struct Wanted {
  const checkpoint::TensorInfo* tensor;
  std::uint64_t* place;
};

}  // namespace

std::uint64_t FileImage::bytes() const noexcept {
  std::uint64_t sum = 0;
  for (const Part& part : parts) sum += part.bytes;
  return sum;
}

std::vector<storage::Extent> FileImage::extents(std::byte* slot) const {
  std::vector<storage::Extent> all;
  all.reserve(parts.size());
  for (const Part& part : parts) {
    all.push_back({part.file, part.offset, part.bytes, slot + part.slot_offset, true});
  }
  return all;
}

FileImage file_image(std::span<const checkpoint::WeightSource* const> matrices,
                     std::span<MatrixPlace> places) {
  std::vector<Wanted> wanted;
  for (std::size_t i = 0; i < matrices.size(); ++i) {
    wanted.push_back({matrices[i]->data, &places[i].data});
    if (matrices[i]->scales != nullptr) wanted.push_back({matrices[i]->scales, &places[i].scales});
  }
  std::ranges::sort(wanted, {},
                    [](const Wanted& w) { return std::pair(w.tensor->file, w.tensor->offset); });

  FileImage image;
  memory::PhasedLayout layout;
  for (std::size_t first = 0; first < wanted.size();) {
    FileImage::Part part{wanted[first].tensor->file, wanted[first].tensor->offset, 0, 0};
    std::size_t next = first;
    for (; next < wanted.size(); ++next) {
      const checkpoint::TensorInfo& tensor = *wanted[next].tensor;
      if (tensor.file != part.file || tensor.offset != part.offset + part.bytes) break;
      *wanted[next].place = part.bytes;
      part.bytes += tensor.bytes;
    }
    part.slot_offset = layout.add(part.offset, part.bytes);
    for (; first < next; ++first) *wanted[first].place += part.slot_offset;
    image.parts.push_back(part);
  }
  image.slot_bytes = layout.bytes();
  return image;
}

FileGroup file_group(std::vector<FileMatrix> matrices) {
  std::vector<const checkpoint::WeightSource*> sources;
  sources.reserve(matrices.size());
  for (const FileMatrix& matrix : matrices) sources.push_back(matrix.source);
  std::vector<MatrixPlace> places(matrices.size());
  FileGroup group;
  group.files = file_image(sources, places);
  for (std::size_t i = 0; i < matrices.size(); ++i) matrices[i].place = places[i];
  group.matrices = std::move(matrices);
  return group;
}

format::WeightView FileMatrix::published_in(const std::byte* slot) const noexcept {
  ops::WeightView shape = *view;
  shape.format = source->format;
  return place.in(slot, shape);
}

format::WeightFormat FileMatrix::format_in(const DenseFormats& formats) const {
  if (!role) return source->format;
  return formats.of(*role, source->format, source->rows, source->cols);
}

void FileGroup::point(const std::byte* slot) const noexcept {
  for (const FileMatrix& matrix : matrices) *matrix.view = matrix.place.in(slot, *matrix.view);
}

ExpertImage expert_image(const checkpoint::MlpSource& source, const ops::ExpertView& view) {
  ExpertImage image;
  const std::array matrices{&source.gate_proj, &source.up_proj, &source.down_proj};
  image.files = file_image(matrices, image.places);
  image.view = &view;
  return image;
}

}  // namespace dsfp4::residency
