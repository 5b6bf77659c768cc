// A weight matrix as the files hold it: its format, recognised from the tensors of its module.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "checkpoint/catalogue.h"
#include "format/weight.h"

namespace dsfp4::checkpoint {

/// Pointers are into the Catalogue, which must outlive this.
struct WeightSource {
  format::WeightFormat format = format::WeightFormat::kF32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  const TensorInfo* data = nullptr;
  const TensorInfo* scales = nullptr;        // null where the format has none
  const TensorInfo* global_scale = nullptr;  // NVFP4 only: a scalar, F32 or BF16
  bool global_scale_is_reciprocal = false;   // compressed-tensors' weight_global_scale

  bool present() const { return data != nullptr; }
  /// Bytes that lie in the files: data + scales (the scalars are not counted).
  std::uint64_t bytes() const;
};

/// Recognises the weight of module `module` ("model.layers.3.mlp.down_proj") and checks that it is
/// [rows, cols]. Throws CheckpointError that names the tensor at fault, and UnsupportedError for a
/// format that is recognised and not supported; both say which format it is.
WeightSource resolve_weight(const Catalogue& catalogue, const std::string& module,
                            std::int64_t rows, std::int64_t cols);

/// The same for a matrix that is never quantised: F32 or BF16.
WeightSource resolve_plain(const Catalogue& catalogue, const TensorInfo& weight, std::int64_t rows,
                           std::int64_t cols);

/// A scale of a whole tensor: F32 or BF16, [] or [1].
const TensorInfo* resolve_scalar(const Catalogue& catalogue, const TensorInfo& tensor);

/// Throws CheckpointError unless `tensor` has one of the dtypes, and the shape. `role`, where it is
/// given, ends the sentence: what such a tensor is.
void check_tensor(const Catalogue& catalogue, const TensorInfo& tensor,
                  std::initializer_list<format::DType> dtypes,
                  const std::vector<std::int64_t>& shape, const std::string& role = "");

}  // namespace dsfp4::checkpoint
