// The calling thread's current device: the plugin's own while a call runs, then the caller's again.
#pragma once

#include "ops/cuda/common.cuh"

namespace dsfp4::ops::cuda {

/// The thread's CUDA context, which is current again when this ends. By the driver's calls:
/// cudaSetDevice() would make a context on a device where the caller has none.
class CallersDevice {
 public:
  /// Makes `context` the current one, or none.
  explicit CallersDevice(CUcontext context);
  ~CallersDevice();
  CallersDevice(const CallersDevice&) = delete;
  CallersDevice& operator=(const CallersDevice&) = delete;
  /// True if that was done; else the failure is noted.
  bool ok() const { return ok_; }

 private:
  CUcontext callers_ = nullptr;
  bool ok_ = false;
};

/// The context that is current.
bool current_context(CUcontext* context);

template <auto kCall>
struct WithDevice;
template <typename... Parameters, bool (*kCall)(Device*, Parameters...)>
struct WithDevice<kCall> {
  static bool call(Device* device, Parameters... parameters) {
    const CallersDevice callers(device->context);
    return callers.ok() && kCall(device, parameters...);
  }
};
template <void (*kCall)(Device*)>
struct WithDevice<kCall> {
  static void call(Device* device) {
    const CallersDevice callers(device->context);
    kCall(device);
  }
};

/// `kCall` on its device, whatever device is the caller's.
template <auto kCall>
inline constexpr auto with = &WithDevice<kCall>::call;

}  // namespace dsfp4::ops::cuda
