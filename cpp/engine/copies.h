// How fast blocks are copied between a device and the host's memory beside it, one way at a time.
#pragma once

#include <cstddef>
#include <span>

#include "base/poll.h"
#include "ops/device.h"

namespace dsfp4::engine {

enum class CopyWay { kIn, kOut };  // to the device, from it

/// Bytes per second of copies of `bytes` bytes between one place of the device and the blocks of
/// its staging memory in turn, which kOut overwrites. Takes `bytes` of the device's memory, and
/// gives them back. `seconds` over 0, at least one block. Throws MemoryLimitError, CudaError and
/// what `poll` throws.
double copy_rate(ops::Device& device, CopyWay way, std::span<std::byte* const> blocks,
                 std::size_t bytes, double seconds, const Poll& poll = {});

}  // namespace dsfp4::engine
