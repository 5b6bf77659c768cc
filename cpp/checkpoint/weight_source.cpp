#include "checkpoint/weight_source.h"

#include "base/checked.h"
#include "checkpoint/safetensors.h"
#include "dsfp4/error.h"

namespace dsfp4::checkpoint {
namespace {

using format::DType;
using format::WeightFormat;
using Shape = std::vector<std::int64_t>;

constexpr const char* kFp8Supported = "FP8 is supported with weight_scale_inv, F32 ";
constexpr const char* kFp8Tiles = ", one for each tile of 128x128";

std::string type_text(DType dtype, const Shape& shape) {
  return std::string(format::dtype_name(dtype)) + " " + shape_text(shape);
}

std::string type_text(const TensorInfo& tensor) {
  return std::string(tensor.dtype_name()) + " " + shape_text(tensor.shape);
}

// `weight` was recognised as `format`, which needs the tensor `name`.
const TensorInfo& require_part(const Catalogue& catalogue, const TensorInfo& weight,
                               const std::string& format, const std::string& name) {
  if (const TensorInfo* tensor = catalogue.find(name)) return *tensor;
  if (catalogue.in_absent_shard(name)) return catalogue.require(name);
  throw CheckpointError(catalogue.file_name(weight), name, -1,
                        "is missing: '" + weight.name + "' is " + type_text(weight) + ", so " +
                            format + ", which needs it");
}

bool is_mxfp4_scale(const TensorInfo& scales, std::int64_t rows, std::int64_t cols) {
  const bool powers_of_two = scales.dtype == DType::kU8 || scales.dtype == DType::kF8E8M0;
  return powers_of_two && cols % format::kMxfp4Group == 0 &&
         scales.shape == Shape{rows, cols / format::kMxfp4Group};
}

WeightSource resolve_fp4(const Catalogue& catalogue, const std::string& module,
                         const TensorInfo& packed, std::int64_t rows, std::int64_t cols) {
  const std::string matrix = " of the NVFP4 matrix '" + packed.name + "'";
  if (packed.dtype == DType::kU8 && cols % format::kNvfp4Group != 0) {
    catalogue.fail(packed, "is U8, so NVFP4, but " + std::to_string(cols) +
                               " columns are not a multiple of 16");
  }
  check_tensor(catalogue, packed, {DType::kU8}, {rows, cols / 2}, "two FP4 values a byte");
  const TensorInfo& scales =
      require_part(catalogue, packed, "FP4 (two values a byte)", module + ".weight_scale");
  const Shape blocks = {rows, cols / format::kNvfp4Group};
  if (is_mxfp4_scale(scales, rows, cols)) {
    catalogue.unsupported(scales, "is " + type_text(scales) +
                                      ", so MXFP4, a power of two for 32 columns; NVFP4 is "
                                      "supported: " +
                                      type_text(DType::kF8E4M3, blocks) +
                                      ", a scale for 16 columns");
  }
  check_tensor(catalogue, scales, {DType::kF8E4M3}, blocks, "the block scales" + matrix);
  WeightSource source{WeightFormat::kNvfp4, rows, cols, &packed, &scales, nullptr, false};
  source.global_scale_is_reciprocal = packed.name.ends_with("_packed");
  source.global_scale = resolve_scalar(
      catalogue, require_part(catalogue, packed, "NVFP4",
                              module + (source.global_scale_is_reciprocal ? ".weight_global_scale"
                                                                          : ".weight_scale_2")));
  return source;
}

// FP8 whose scales have the name that other exporters use.
[[noreturn]] void refuse_fp8_scales(const Catalogue& catalogue, const TensorInfo& scales,
                                    std::int64_t rows, const Shape& tiles) {
  std::string kind = "FP8 scales of no known kind";
  if (scales.shape.empty() || scales.shape == Shape{1}) {
    kind = "one FP8 scale for the whole matrix";
  } else if (scales.shape == Shape{rows, 1} || scales.shape == Shape{rows}) {
    kind = "an FP8 scale for each row";
  } else if (scales.shape == tiles) {
    kind = "FP8 scales of tiles under another name";
  }
  catalogue.unsupported(scales, "is " + type_text(scales) + ", " + kind + "; " + kFp8Supported +
                                    shape_text(tiles) + kFp8Tiles);
}

WeightSource resolve_fp8(const Catalogue& catalogue, const std::string& module,
                         const TensorInfo& weight, std::int64_t rows, std::int64_t cols) {
  check_tensor(catalogue, weight, {DType::kF8E4M3}, {rows, cols});
  const Shape tiles = {ceil_div(rows, format::kFp8Tile), ceil_div(cols, format::kFp8Tile)};
  const std::string name = module + ".weight_scale_inv";
  const TensorInfo* other = catalogue.find(module + ".weight_scale");
  if (other != nullptr && catalogue.find(name) == nullptr) {
    refuse_fp8_scales(catalogue, *other, rows, tiles);
  }
  const TensorInfo& scales = require_part(catalogue, weight, "FP8", name);
  if (scales.dtype != DType::kF32 && scales.shape == tiles) {
    catalogue.unsupported(scales, "is " + type_text(scales) + ", the scales of an FP8 matrix; " +
                                      kFp8Supported + shape_text(tiles) + kFp8Tiles);
  }
  check_tensor(catalogue, scales, {DType::kF32}, tiles,
               "the scales of the FP8 matrix '" + weight.name + "'" + kFp8Tiles);
  return {WeightFormat::kFp8Block, rows, cols, &weight, &scales, nullptr, false};
}

// A module without a weight that is known: what it has instead says what it may be.
const TensorInfo& require_weight(const Catalogue& catalogue, const std::string& module) {
  constexpr int kNamed = 8;
  const std::string name = module + ".weight";
  std::string parts;
  const TensorInfo* first = nullptr;
  int count = 0;
  for (const TensorInfo& tensor : catalogue.tensors()) {
    if (!tensor.name.starts_with(module + ".")) continue;
    if (first == nullptr) first = &tensor;
    if (++count > kNamed) {
      parts += ", ...";
      break;
    }
    parts += (count == 1 ? "" : ", ") + tensor.name.substr(module.size() + 1) + " (" +
             std::string(tensor.dtype_name()) + ")";
  }
  if (first == nullptr || catalogue.in_absent_shard(name)) return catalogue.require(name);
  throw CheckpointError(catalogue.file_name(*first), name, -1,
                        "is missing, and what its module has is no format that is known here: " +
                            parts + "; NVFP4, FP8, BF16 and F32 are");
}

}  // namespace

void check_tensor(const Catalogue& catalogue, const TensorInfo& tensor,
                  std::initializer_list<DType> dtypes, const Shape& shape,
                  const std::string& role) {
  std::string expected;
  for (const DType dtype : dtypes) {
    if (tensor.dtype == dtype && tensor.shape == shape) return;
    expected += (expected.empty() ? "" : " or ") + type_text(dtype, shape);
  }
  catalogue.fail(tensor, "is " + type_text(tensor) + "; it must be " + expected +
                             (role.empty() ? "" : ", " + role));
}

const TensorInfo* resolve_scalar(const Catalogue& catalogue, const TensorInfo& tensor) {
  const bool scalar = tensor.shape.empty() || tensor.shape == Shape{1};
  if (!scalar || (tensor.dtype != DType::kF32 && tensor.dtype != DType::kBF16)) {
    catalogue.fail(tensor, "is " + type_text(tensor) + "; it must be F32 or BF16, [] or [1]");
  }
  return &tensor;
}

std::uint64_t WeightSource::bytes() const {
  return (data == nullptr ? 0 : data->bytes) + (scales == nullptr ? 0 : scales->bytes);
}

WeightSource resolve_plain(const Catalogue& catalogue, const TensorInfo& weight, std::int64_t rows,
                           std::int64_t cols) {
  check_tensor(catalogue, weight, {DType::kBF16, DType::kF32}, {rows, cols});
  const WeightFormat format =
      weight.dtype == DType::kF32 ? WeightFormat::kF32 : WeightFormat::kBF16;
  return {format, rows, cols, &weight, nullptr, nullptr, false};
}

WeightSource resolve_weight(const Catalogue& catalogue, const std::string& module,
                            std::int64_t rows, std::int64_t cols) {
  const std::string packed_name = module + ".weight_packed";
  const TensorInfo* weight = catalogue.find(module + ".weight");
  const TensorInfo* packed = catalogue.find(packed_name);
  if (weight != nullptr && packed != nullptr) {
    catalogue.fail(*packed, "the same matrix is there as '" + weight->name + "' too");
  }
  if (packed == nullptr && catalogue.in_absent_shard(packed_name)) catalogue.require(packed_name);
  if (packed == nullptr && weight == nullptr) weight = &require_weight(catalogue, module);
  if (packed != nullptr) return resolve_fp4(catalogue, module, *packed, rows, cols);
  switch (weight->dtype) {
    case DType::kU8:
      return resolve_fp4(catalogue, module, *weight, rows, cols);
    case DType::kF8E4M3:
      return resolve_fp8(catalogue, module, *weight, rows, cols);
    case DType::kBF16:
    case DType::kF32:
      return resolve_plain(catalogue, *weight, rows, cols);
    default:
      catalogue.fail(*weight, "is " + type_text(*weight) +
                                  "; a weight must be NVFP4 (U8), FP8 (F8_E4M3), BF16 or F32");
  }
}

}  // namespace dsfp4::checkpoint
