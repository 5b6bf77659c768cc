// Which kernel multiplies: by format, shape, alignment and number of tokens.
#include "ops/cuda/kernels.h"

namespace dsfp4::ops::cuda {

std::size_t linear_workspace(Device*, const format::WeightView*, std::int64_t) { return 0; }

bool linear(Device* device, const format::WeightView* weight, ConstMatrix x, Matrix y,
            Inputs inputs, std::byte*) {
  return linear_plain(device, *weight, x, y, inputs);
}

}  // namespace dsfp4::ops::cuda
