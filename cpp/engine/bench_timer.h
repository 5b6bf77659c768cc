// Times what is queued on a GPU, by its own clock, for benchmarks.
#pragma once

#include <functional>

#include "ops/cuda_device.h"

namespace dsfp4::engine {

/// All throw CudaError.
class CudaTimer {
 public:
  /// Both must outlive this.
  CudaTimer(const ops::cuda::Plugin& plugin, ops::CudaDevice& device)
      : plugin_(plugin), device_(device.opened()) {}

  /// Seconds of one call: the median over nine runs of a graph of call(0) to call(`rotate` - 1),
  /// after 0.1 s of them.
  double seconds_of(int rotate, const std::function<void(int)>& call);
  /// The same of a call that cannot be recorded.
  double seconds_queued(const std::function<void()>& call);

 private:
  void check(bool ok) const { ops::cuda_check(plugin_, ok); }
  double median_seconds(const std::function<void()>& queue);

  const ops::cuda::Plugin& plugin_;
  ops::cuda::Device* device_;
};

}  // namespace dsfp4::engine
