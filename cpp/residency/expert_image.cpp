#include "residency/expert_image.h"

#include <algorithm>
#include <array>
#include <cstddef>

#include "base/checked.h"
#include "storage/reader.h"

namespace dsfp4::residency {

using checkpoint::TensorInfo;

std::uint64_t ExpertImage::bytes() const noexcept {
  std::uint64_t sum = 0;
  for (const Part& part : parts) sum += part.bytes;
  return sum;
}

std::uint64_t slot_bytes(const ExpertImage& image) {
  std::uint64_t end = 0;
  for (const ExpertImage::Part& part : image.parts) {
    end = std::max(end, part.slot_offset + part.bytes);
  }
  return ceil_div(end, storage::kBlockBytes) * storage::kBlockBytes;
}

ExpertImage expert_image(const checkpoint::MlpSource& source, const ops::ExpertView& view) {
  const std::array<const TensorInfo*, 6> tensors{source.gate_proj.data, source.gate_proj.scales,
                                                 source.up_proj.data,   source.up_proj.scales,
                                                 source.down_proj.data, source.down_proj.scales};
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i] != nullptr) order.push_back(i);
  }
  std::ranges::sort(order, {},
                    [&](std::size_t i) { return std::pair(tensors[i]->file, tensors[i]->offset); });

  ExpertImage image;
  image.view = &view;
  image.places.fill(kNoPlace);
  for (const std::size_t i : order) {
    const TensorInfo& tensor = *tensors[i];
    std::vector<ExpertImage::Part>& parts = image.parts;
    const bool adjacent = !parts.empty() && parts.back().file == tensor.file &&
                          parts.back().offset + parts.back().bytes == tensor.offset;
    if (!adjacent) {
      const std::uint64_t start = slot_bytes(image) + tensor.offset % storage::kBlockBytes;
      parts.push_back({tensor.file, tensor.offset, 0, start});
    }
    image.places[i] = parts.back().slot_offset + parts.back().bytes;
    parts.back().bytes += tensor.bytes;
  }
  return image;
}

}  // namespace dsfp4::residency
