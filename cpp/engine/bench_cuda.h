// Times the CUDA kernels at DeepSeek-R1's shapes, beside what the device can do.
#pragma once

#include <string>
#include <vector>

namespace dsfp4::engine {

struct KernelTime {
  std::string name;
  double seconds = 0.0;
  double bytes = 0.0;  // that must be read and written
  double flops = 0.0;
  double floor = 0.0;  // seconds: the larger of bytes / read rate and flops / mma.sync rate
};

/// Device `index`. The first two results are the read rate and the rate of mma.sync on registers,
/// measured here; weights are random and read from more memory than the cache holds. Takes about
/// 7 GB of VRAM and some seconds. `only`: cases whose name holds this text (all if empty). Throws
/// CudaError and MemoryLimitError.
std::vector<KernelTime> bench_cuda(int index, const std::string& only);

}  // namespace dsfp4::engine
