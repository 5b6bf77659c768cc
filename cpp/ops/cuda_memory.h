// Memory that ops on an NVIDIA GPU take beside their operands: known without a GPU, so that a plan
// may be for one that is not there.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ops/ops.h"

namespace dsfp4::ops {

/// The CUDA context, on GPUs from Ampere to Hopper with the kernels loaded: an assumption for plans
/// without a GPU; a load measures it.
inline constexpr std::uint64_t kCudaContextBytes = std::uint64_t{512} << 20;

/// The least bytes of a buffer that the host's part of a step is uploaded to.
inline constexpr std::size_t kCudaSmallBuffer = std::size_t{64} << 10;

/// Tokens that attention over `tokens` latents is laid out for: a power of two, so that a recording
/// is good up to there.
std::int64_t rounded_length(std::int64_t tokens);

/// Of the largest step, in bytes.
struct CudaStepMemory {
  std::size_t workspace = 0;
  std::size_t ids = 0;
  std::size_t rows = 0;
  std::size_t blocks = 0;
  std::size_t forced = 0;
};
CudaStepMemory cuda_step_memory(const Ops::Largest& largest);

/// As Ops::working_bytes() of a GPU.
std::uint64_t cuda_working_bytes(const Ops::Largest& largest);

}  // namespace dsfp4::ops
