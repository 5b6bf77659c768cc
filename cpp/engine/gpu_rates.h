// The rates of an NVIDIA GPU and of PCIe, without a model.
#pragma once

#include "engine/bench_timer.h"

namespace dsfp4::engine {

/// Bytes per second.
struct GpuRates {
  double copy_in = 0.0;  // from RAM, pinned if the system allows it, to VRAM
  double copy_out = 0.0;
  double read = 0.0;  // of VRAM, by the GPU
};

/// Of device `index`. Takes 1.1 GB of VRAM and 0.3 GB of RAM, and gives them back. `seconds`, over
/// 0: for copies each way. Throws CudaError and MemoryLimitError.
GpuRates measure_gpu(int index, double seconds);

/// Seconds in which the GPU reads `bytes` bytes of its memory, more than its cache holds.
double read_seconds(const ops::cuda::Plugin& plugin, ops::CudaDevice& device, CudaTimer& timer,
                    DevicePtr<const std::byte> memory, std::size_t bytes);

}  // namespace dsfp4::engine
