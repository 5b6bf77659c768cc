// The CUDA backend beside `reference`. Without a GPU the tests are skipped, unless
// DSFP4_REQUIRE_CUDA is set. Outputs are poisoned with OwnedMatrix's initial value.
#pragma once

#include <cstdlib>
#include <memory>
#include <vector>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "memory/arena.h"
#include "ops/cuda_plugin.h"
#include "ops/ops.h"
#include "ops/random_weight.h"

namespace dsfp4::ops {

using testing::OwnedMatrix;
using testing::random_values;
using testing::random_weight;
using testing::relative_error;

inline constexpr double kTolerance = 5e-3;  // BF16 inputs

class Cuda : public ::testing::Test {
 protected:
  void SetUp() override {
    try {
      cuda_device(0);
    } catch (const CudaError& error) {
      if (std::getenv("DSFP4_REQUIRE_CUDA") != nullptr) FAIL() << error.what();
      GTEST_SKIP() << error.what();
    }
    backend_ = make_cuda_ops(0, 0);
    reference_ = make_reference_ops(2);
    arena_ = std::make_unique<memory::Arena>(std::size_t{512} << 20, "the tests",
                                             backend_->device().memory());
  }

  template <typename T>
  DevicePtr<T> on_device(const T* values, std::size_t count) {
    const DevicePtr<T> to = arena_->take_array<T>(count);
    backend_->device().upload(values, to, count * sizeof(T));
    return to;
  }
  Matrix on_device(const OwnedMatrix& matrix) {
    return {on_device(matrix.values.data(), matrix.values.size()), matrix.rows_, matrix.cols_,
            matrix.cols_};
  }
  WeightView on_device(const format::EncodedMatrix& matrix) {
    WeightView view = matrix.view();
    view.data = on_device(matrix.data.data(), matrix.data.size());
    view.scales = on_device(matrix.scales.data(), matrix.scales.size());
    return view;
  }
  std::vector<float> on_host(ConstMatrix matrix) {
    std::vector<float> values(static_cast<std::size_t>(matrix.rows * matrix.cols));
    backend_->device().download(matrix.data, values.data(), values.size() * sizeof(float));
    return values;
  }

  std::unique_ptr<Ops> backend_;
  std::unique_ptr<Ops> reference_;
  std::unique_ptr<memory::Arena> arena_;
};

}  // namespace dsfp4::ops
