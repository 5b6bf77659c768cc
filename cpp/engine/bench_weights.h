// Random weights on a device, more of them than its cache holds, for benchmarks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>

#include "memory/arena.h"
#include "ops/device.h"
#include "ops/views.h"

namespace dsfp4::engine {

/// One pool of random codes that matrices of any format are cut from, front to back and round.
class RandomWeights {
 public:
  static constexpr std::size_t kBytes = std::size_t{4400} << 20;

  /// Takes kBytes and 192 MiB of scales of the device's memory. Throws MemoryLimitError, CudaError.
  RandomWeights(ops::Device& device, std::mt19937& random);

  /// The next matrix; the pool begins again where it ends.
  ops::WeightView next(format::WeightFormat format, std::int64_t rows, std::int64_t cols);
  /// All kBytes of codes.
  DevicePtr<const std::byte> memory() const noexcept { return codes_base_; }

 private:
  memory::Arena codes_;
  memory::Arena scales_;
  DevicePtr<std::byte> codes_base_, scales_base_;
  std::size_t codes_at_ = 0;
  std::size_t scales_at_ = 0;
};

}  // namespace dsfp4::engine
