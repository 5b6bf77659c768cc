// Views with plain pointers, for backends and kernels, and the way there. Nothing outside ops/ may
// include this: what it would read may be a GPU's.
#pragma once

#include <span>

#include "base/device_access.h"
#include "ops/views.h"

namespace dsfp4::ops {

namespace raw {

using Matrix = MatrixOf<float*>;
using ConstMatrix = MatrixOf<const float*>;
using ExpertView = ExpertViewOf<format::WeightView>;
using ExpertTask = ExpertTaskOf<ExpertView>;

}  // namespace raw

template <typename T>
T* unwrap(DevicePtr<T> pointer) {
  return DeviceAccess::address(pointer);
}
template <typename T>
std::span<T> unwrap(DeviceSpan<T> values) {
  return {unwrap(values.data), values.size};
}
template <typename T>
MatrixOf<T*> unwrap(const MatrixOf<DevicePtr<T>>& x) {
  return {unwrap(x.data), x.rows, x.cols, x.stride};
}
inline format::WeightView unwrap(const WeightView& weight) {
  return {weight.format,       weight.rows,           weight.cols,
          unwrap(weight.data), unwrap(weight.scales), weight.global_scale};
}
inline raw::ExpertView unwrap(const ExpertView& expert) {
  return {unwrap(expert.gate_proj), unwrap(expert.up_proj), unwrap(expert.down_proj)};
}

}  // namespace dsfp4::ops
