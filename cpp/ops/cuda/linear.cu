// Which kernel multiplies: by format, shape, alignment and number of tokens.
#include "ops/cuda/kernels.h"
#include "ops/cuda/words.cuh"
#include "ops/cuda/workspaces.h"

namespace dsfp4::ops::cuda {

namespace {

bool is_large(const format::WeightView& weight, std::int64_t tokens) {
  return tokens > kFewRows && linear_large_fit(weight);
}

}  // namespace

bool linear(Device* device, const format::WeightView* weight, ConstMatrix x, Matrix y,
            Inputs inputs, std::byte* workspace) {
  if (x.rows == 0 || weight->rows == 0) return true;
  if (inputs == Inputs::kF32 && linear_exact_fit(*weight, x)) {
    return linear_exact(device, *weight, x, y);
  }
  if (inputs == Inputs::kF32 || !has_words(*weight)) {
    return linear_plain(device, *weight, x, y, inputs);
  }
  if (is_large(*weight, x.rows)) return linear_large(device, *weight, x, y, workspace);
  return linear_small(device, *weight, x, y);
}

bool linear_pair(Device* device, const format::WeightView* first, Matrix y_first,
                 const format::WeightView* second, Matrix y_second, ConstMatrix x,
                 std::byte* workspace) {
  const bool together = first->format == second->format && first->cols == second->cols &&
                        has_words(*first) && has_words(*second) && !is_large(*first, x.rows) &&
                        !is_large(*second, x.rows) && x.rows > 0;
  if (together) return linear_small_pair(device, *first, y_first, *second, y_second, x);
  return linear(device, first, x, y_first, Inputs::kBf16, workspace) &&
         linear(device, second, x, y_second, Inputs::kBf16, workspace);
}

}  // namespace dsfp4::ops::cuda
