#include "engine/weight_check.h"

#include <cstdint>
#include <string>
#include <utility>

#include "dsfp4/error.h"
#include "format/nonfinite.h"

namespace dsfp4::engine {
namespace {

// Some tenths of a second of hashing on one core; the thread team is free between groups.
constexpr std::uint64_t kGroupBytes = std::uint64_t{1} << 30;

}  // namespace

void add_tensors(const checkpoint::WeightSource& source, const format::WeightView& view,
                 bool finite, std::vector<ReadTensor>& tensors) {
  tensors.push_back({source.data, view.data, std::nullopt, finite});
  if (source.scales != nullptr) tensors.push_back({source.scales, view.scales, view, false});
}

WeightCheck::WeightCheck(checkpoint::Catalogue catalogue, int threads)
    : catalogue_(std::move(catalogue)),
      hashes_(checkpoint::TensorHashes::read(catalogue_.folder())),
      pool_(threads) {}

void WeightCheck::check(std::span<const ReadTensor> tensors, const Poll& poll) {
  while (!tensors.empty()) {
    std::size_t count = 0;
    for (std::uint64_t bytes = 0; count < tensors.size() && bytes < kGroupBytes; ++count) {
      bytes += tensors[count].tensor->bytes;
    }
    pool_.parallel_for(static_cast<std::int64_t>(count), 1,
                       [&](std::int64_t begin, std::int64_t end) {
                         for (std::int64_t i = begin; i < end; ++i) {
                           check_one(tensors[static_cast<std::size_t>(i)]);
                         }
                       });
    tensors = tensors.subspan(count);
    ask(poll);
  }
}

void WeightCheck::check_one(const ReadTensor& read) const {
  const checkpoint::TensorInfo& tensor = *read.tensor;
  if (hashes_) hashes_->check(catalogue_, tensor, {read.bytes, tensor.bytes});
  if (read.finite) check_finite(read);
  if (!read.scales_of) return;
  format::WeightView view = *read.scales_of;
  view.scales = read.bytes;
  if (const auto bad = format::find_bad_scale(view)) {
    throw CheckpointError(catalogue_.file_name(tensor), tensor.name,
                          static_cast<std::int64_t>(tensor.offset + *bad),
                          "this block scale is NaN or infinite; download the file again");
  }
}

void WeightCheck::check_finite(const ReadTensor& read) const {
  const checkpoint::TensorInfo& tensor = *read.tensor;
  format::Nonfinite found;
  format::find_nonfinite(tensor.dtype, {read.bytes, tensor.bytes}, 0, found);
  if (found.count == 0) return;
  const std::uint64_t size = format::dtype_size(tensor.dtype);
  throw CheckpointError(catalogue_.file_name(tensor), tensor.name,
                        static_cast<std::int64_t>(tensor.offset + found.first),
                        "value " + std::to_string(found.first / size) + " of " +
                            std::to_string(tensor.bytes / size) +
                            " is NaN or infinite; download the file again");
}

}  // namespace dsfp4::engine
