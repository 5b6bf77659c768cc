// Which kernel multiplies: by format, shape, alignment and number of tokens.
#include "ops/cuda/kernels.h"
#include "ops/cuda/words.cuh"

namespace dsfp4::ops::cuda {

namespace {

// Up to here the whole of a token's row lies in shared memory and a weight is read once.
constexpr std::int64_t kFew = 8;

bool is_large(const format::WeightView& weight, std::int64_t tokens) {
  return tokens > kFew && linear_large_fit(weight);
}

}  // namespace

std::size_t linear_workspace(Device*, const format::WeightView* weight, std::int64_t tokens) {
  return is_large(*weight, tokens) ? linear_large_workspace(*weight, tokens) : 0;
}

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

}  // namespace dsfp4::ops::cuda
