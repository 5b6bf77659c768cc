// Memory of a device with matrices and weights in it, for tests that run on any device.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "memory/arena.h"
#include "ops/ops.h"
#include "ops/random_weight.h"

namespace dsfp4::ops::testing {

class Room {
 public:
  explicit Room(Device& device, std::size_t bytes = std::size_t{1} << 20)
      : device_(device), arena_(bytes, "the test's values", device.memory()) {}

  DevicePtr<std::byte> bytes(std::size_t count) { return arena_.take(count); }
  template <typename T>
  DeviceSpan<T> array(std::size_t count) {
    return {arena_.take_array<T>(count), count};
  }
  Matrix matrix(std::int64_t rows, std::int64_t cols) {
    return {array<float>(static_cast<std::size_t>(rows * cols)).data, rows, cols, cols};
  }
  /// With random values.
  Matrix matrix(std::int64_t rows, std::int64_t cols, std::uint32_t seed) {
    const Matrix made = matrix(rows, cols);
    put(made, random_values(rows * cols, seed));
    return made;
  }
  WeightView weight(format::WeightFormat format, std::int64_t rows, std::int64_t cols,
                    std::uint32_t seed) {
    const format::EncodedMatrix on_host = random_weight(format, rows, cols, seed);
    return {format, rows, cols, copy(on_host.data), copy(on_host.scales), on_host.global_scale};
  }

  void put(const Matrix& to, const std::vector<float>& values) {
    device_.upload(values.data(), to.data, values.size() * sizeof(float));
  }
  template <typename T>
  std::vector<T> get(DeviceSpan<T> from) {
    std::vector<T> values(from.size);
    device_.download(from.data, values.data(), from.size_bytes());
    return values;
  }
  std::vector<float> get(const Matrix& from) {
    return get(DeviceSpan<float>(from.data, static_cast<std::size_t>(from.rows * from.cols)));
  }

 private:
  DevicePtr<const std::byte> copy(const std::vector<std::byte>& from) {
    if (from.empty()) return nullptr;
    const DevicePtr<std::byte> to = bytes(from.size());
    device_.upload(from.data(), to, from.size());
    return to;
  }

  Device& device_;
  memory::Arena arena_;
};

}  // namespace dsfp4::ops::testing
