// Helpers that the tests of the emulated device share.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include <gtest/gtest.h>

#include "emulated/emulated_ops.h"
#include "emulated/room.h"
#include "memory/arena.h"

namespace dsfp4::ops::testing {

inline bool all_nan(const std::vector<float>& values) {
  return std::ranges::all_of(values, [](float v) { return std::isnan(v); });
}

inline std::vector<float> doubled(std::vector<float> values) {
  for (float& v : values) v += v;
  return values;
}

/// An emulated device with some values.
class EmulatedFixture : public ::testing::Test {
 protected:
  // Values in staging memory.
  float* staged(const std::vector<float>& from) {
    float* memory = memory::on_host(device.staging(), staging.take_array<float>(from.size()));
    std::ranges::copy(from, memory);
    return memory;
  }
  void copy_in(const float* from, const Matrix& to) {
    device.copy_in(Queue::kUpload, from, to.data,
                   static_cast<std::size_t>(to.rows * to.cols) * sizeof(float));
  }

  EmulatedOps ops;
  EmulatedDevice& device = *ops.emulated();
  Room room{device};
  memory::Arena staging{std::size_t{1} << 16, "the test's copies", device.staging()};
  const std::vector<float> values = random_values(8, 1);
  const Matrix slot = room.matrix(1, 8);
  const Matrix out = room.matrix(1, 8);
};

}  // namespace dsfp4::ops::testing
