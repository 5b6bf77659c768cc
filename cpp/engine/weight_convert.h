// Weights in another format than the published one, encoded as they go to where they will lie.
#pragma once

#include <cstdint>

#include "base/device_ptr.h"
#include "base/poll.h"
#include "base/thread_pool.h"
#include "format/weight.h"
#include "ops/device.h"

namespace dsfp4::engine {

/// Bytes of RAM that convert() takes for a matrix of so many columns.
std::uint64_t conversion_bytes(int threads, std::int64_t cols);

/// Encodes `from`, which is in RAM and of finite values, in the format of `to`, kFp8Block or
/// kNvfp4, and writes it to where that points in the device's memory. Returns the global scale, 1
/// where the format has none. `poll` is asked between bands of rows; what it throws leaves
/// convert().
float convert(const format::WeightView& from, const format::WeightViewOf<DevicePtr<std::byte>>& to,
              ops::Device& device, ThreadPool& pool, const Poll& poll);

}  // namespace dsfp4::engine
