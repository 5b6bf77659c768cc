// Random operands for measurements: made as fast as memory takes them, with no encoder.
#pragma once

#include <cstdint>
#include <vector>

#include "base/thread_pool.h"
#include "format/block.h"

namespace dsfp4::ops::measure {

/// Finite values, most of them far below 1, in the format's own codes, scales included.
format::EncodedMatrix random_weight(ThreadPool& pool, format::WeightFormat format,
                                    std::int64_t rows, std::int64_t cols, std::uint64_t seed);
/// Uniform in (-1, 1).
std::vector<float> random_floats(std::int64_t count, std::uint64_t seed);

}  // namespace dsfp4::ops::measure
