#include "ops/cuda/current_device.cuh"

namespace dsfp4::ops::cuda {
namespace {

// Of the driver itself, as the plugin links the runtime only; null if there is none.
template <typename Function>
Function driver_function(const char* name) {
  cudaDriverEntryPointQueryResult found{};
  void* entry = nullptr;
  const cudaError_t code =
      cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &found);
  if (code != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<Function>(entry);
}

bool get_context(CUcontext* context) {
  static const auto get = driver_function<decltype(&cuCtxGetCurrent)>("cuCtxGetCurrent");
  if (get == nullptr) return false;
  const CUresult result = get(context);
  if (result == CUDA_ERROR_NOT_INITIALIZED) *context = nullptr;  // no thread has one yet
  return result == CUDA_SUCCESS || result == CUDA_ERROR_NOT_INITIALIZED;
}

bool set_context(CUcontext context) {
  static const auto set = driver_function<decltype(&cuCtxSetCurrent)>("cuCtxSetCurrent");
  return set != nullptr && set(context) == CUDA_SUCCESS;
}

}  // namespace

bool current_context(CUcontext* context) {
  if (get_context(context)) return true;
  return fail(cudaErrorInvalidDevice, "cuCtxGetCurrent", __FILE__, __LINE__);
}

CallersDevice::CallersDevice(CUcontext context) : ok_(current_context(&callers_)) {
  if (!ok_ || callers_ == context || set_context(context)) return;
  ok_ = fail(cudaErrorInvalidDevice, "cuCtxSetCurrent", __FILE__, __LINE__);
}

CallersDevice::~CallersDevice() {
  CUcontext now = nullptr;
  // A call changes it only by making the plugin's own current, so there is nothing to report here.
  if (get_context(&now) && now != callers_) set_context(callers_);
}

}  // namespace dsfp4::ops::cuda
