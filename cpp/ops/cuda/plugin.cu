// The table that the core loads, and what is not a kernel: the device, its memory, graphs.
#include <array>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <type_traits>

#include "ops/cuda/common.cuh"
#include "ops/cuda/current_device.cuh"
#include "ops/cuda/kernels.h"
#include "ops/cuda/nvml.h"
#include "ops/cuda/workspaces.h"

namespace dsfp4::ops::cuda {
namespace {

thread_local Failure last_failure;

const Failure* failure() { return &last_failure; }

// ---- NVML: used memory before there is a context
// -------------------------------------------------

// 0 where the driver's management library is not there.
std::uint64_t free_without_context(const char* bus, const cudaUUID_t& cuda_uuid, int index) {
  void* library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return 0;
  const auto load = [library](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
  };
  Nvml nvml;
  load(nvml.init, "nvmlInit_v2");
  load(nvml.shutdown, "nvmlShutdown");
  load(nvml.find_by_bus, "nvmlDeviceGetHandleByPciBusId_v2");
  load(nvml.find_by_uuid, "nvmlDeviceGetHandleByUUID");
  load(nvml.mig_mode, "nvmlDeviceGetMigMode");
  load(nvml.memory, "nvmlDeviceGetMemoryInfo");
  std::array<unsigned char, 16> uuid;
  std::memcpy(uuid.data(), cuda_uuid.bytes, uuid.size());
  const char* list = std::getenv("CUDA_VISIBLE_DEVICES");
  const std::uint64_t free =
      free_without_context(nvml, bus, uuid, visible_device(list == nullptr ? "" : list, index));
  dlclose(library);
  return free;
}

bool probe(int index, DeviceInfo* info) {
  *info = DeviceInfo{};
  DSFP4_TRY(cudaDriverGetVersion(&info->driver_version));
  DSFP4_TRY(cudaRuntimeGetVersion(&info->runtime_version));
  if (info->driver_version == 0) return true;
  const cudaError_t code = cudaGetDeviceCount(&info->count);
  if (code != cudaSuccess) {
    cudaGetLastError();
    info->count = 0;
    if (code == cudaErrorNoDevice || code == cudaErrorInsufficientDriver) return true;
    return fail(code, "cudaGetDeviceCount(&info->count)", __FILE__, __LINE__);
  }
  if (index < 0 || index >= info->count) return true;
  cudaDeviceProp properties{};
  DSFP4_TRY(cudaGetDeviceProperties(&properties, index));
  std::strncpy(info->name, properties.name, sizeof(info->name) - 1);
  info->major = properties.major;
  info->minor = properties.minor;
  info->multiprocessors = properties.multiProcessorCount;
  info->total_bytes = properties.totalGlobalMem;
  char bus[32] = {};
  DSFP4_TRY(cudaDeviceGetPCIBusId(bus, sizeof(bus), index));
  info->free_bytes = free_without_context(bus, properties.uuid, index);
  return true;
}

void close(Device* device) {
  for (cudaEvent_t event : device->marks) {
    if (event != nullptr) cudaEventDestroy(event);
  }
  for (cudaEvent_t event : device->ring_left) {
    if (event != nullptr) cudaEventDestroy(event);
  }
  if (device->clock != nullptr) cudaEventDestroy(device->clock);
  for (cudaStream_t stream :
       {device->stream, device->uploads, device->downloads, device->clock_stream}) {
    if (stream != nullptr) cudaStreamDestroy(stream);
  }
  delete device;
}

// Streams and events of a device that is current.
bool make_queues(Device* device) {
  DSFP4_TRY(cudaStreamCreateWithFlags(&device->stream, cudaStreamNonBlocking));
  DSFP4_TRY(cudaStreamCreateWithFlags(&device->uploads, cudaStreamNonBlocking));
  DSFP4_TRY(cudaStreamCreateWithFlags(&device->downloads, cudaStreamNonBlocking));
  for (cudaEvent_t& event : device->ring_left) {
    DSFP4_TRY(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  }
  return true;
}

bool open(int index, [[maybe_unused]] bool portable, Device** device) {
  const CallersDevice callers(nullptr);  // else the runtime stays in a context of the caller's
  if (!callers.ok()) return false;
  DSFP4_TRY(cudaSetDevice(index));
  cudaDeviceProp properties{};
  DSFP4_TRY(cudaGetDeviceProperties(&properties, index));
  auto* opened = new Device;
  opened->index = index;
  opened->major = properties.major;
#if defined(DSFP4_WGMMA)
  opened->wgmma = properties.major == 9 && !portable;
#endif
  opened->multiprocessors = properties.multiProcessorCount;
  opened->shared_bytes = static_cast<int>(properties.sharedMemPerBlockOptin);
  if (!make_queues(opened) || !current_context(&opened->context)) {
    close(opened);
    return false;
  }
  *device = opened;
  return true;
}

bool use_ring(Device* device, std::byte* ring) {
  device->ring = ring;
  void* there = nullptr;
  if (cudaHostGetDevicePointer(&there, ring, 0) != cudaSuccess) cudaGetLastError();
  device->ring_there = static_cast<const std::byte*>(there);
  return true;
}

bool memory(Device*, std::uint64_t* free, std::uint64_t* total) {
  std::size_t free_bytes = 0;
  std::size_t total_bytes = 0;
  DSFP4_TRY(cudaMemGetInfo(&free_bytes, &total_bytes));
  *free = free_bytes;
  *total = total_bytes;
  return true;
}

bool allocate(Device*, std::size_t bytes, std::byte** memory) {
  DSFP4_TRY(cudaMalloc(memory, bytes));
  return true;
}

bool free_memory(Device*, std::byte* memory) {
  DSFP4_TRY(cudaFree(memory));
  return true;
}

bool pin(Device*, std::byte* memory, std::size_t bytes) {
  DSFP4_TRY(cudaHostRegister(memory, bytes, cudaHostRegisterDefault));
  return true;
}

bool unpin(Device*, std::byte* memory) {
  DSFP4_TRY(cudaHostUnregister(memory));
  return true;
}

cudaStream_t stream_of(Device* device, Queue queue) {
  switch (queue) {
    case Queue::kUpload:
      return device->uploads;
    case Queue::kDownload:
      return device->downloads;
    case Queue::kCompute:
      break;
  }
  return device->stream;
}

bool upload(Device* device, const void* host, void* to, std::size_t bytes) {
  const auto* from = static_cast<const std::byte*>(host);
  auto* destination = static_cast<std::byte*>(to);
  while (bytes > 0) {
    std::size_t piece = bytes;
    std::byte* staged = ring_space(device, piece, false);
    if (staged == nullptr) return false;
    std::memcpy(staged, from, piece);
    DSFP4_TRY(cudaMemcpyAsync(destination, staged, piece, cudaMemcpyHostToDevice, device->stream));
    from += piece;
    destination += piece;
    bytes -= piece;
  }
  return true;
}

bool copy_in(Device* device, Queue queue, const void* host, void* to, std::size_t bytes) {
  DSFP4_TRY(cudaMemcpyAsync(to, host, bytes, cudaMemcpyHostToDevice, stream_of(device, queue)));
  return true;
}

bool copy_out(Device* device, Queue queue, const void* from, void* host, std::size_t bytes) {
  DSFP4_TRY(cudaMemcpyAsync(host, from, bytes, cudaMemcpyDeviceToHost, stream_of(device, queue)));
  return true;
}

bool download(Device* device, const void* from, void* host, std::size_t bytes) {
  DSFP4_TRY(cudaMemcpyAsync(host, from, bytes, cudaMemcpyDeviceToHost, device->stream));
  DSFP4_TRY(cudaStreamSynchronize(device->stream));
  return true;
}

bool synchronize(Device* device) {
  for (cudaStream_t queue : {device->uploads, device->stream, device->downloads}) {
    DSFP4_TRY(cudaStreamSynchronize(queue));
  }
  return true;
}

bool make_event(Device*, bool timed, void** event) {
  cudaEvent_t made = nullptr;
  DSFP4_TRY(cudaEventCreateWithFlags(&made, timed ? cudaEventDefault : cudaEventDisableTiming));
  *event = made;
  return true;
}

bool free_event(Device*, void* event) {
  DSFP4_TRY(cudaEventDestroy(static_cast<cudaEvent_t>(event)));
  return true;
}

bool record(Device* device, Queue queue, void* event) {
  DSFP4_TRY(cudaEventRecord(static_cast<cudaEvent_t>(event), stream_of(device, queue)));
  return true;
}

bool wait(Device* device, Queue queue, void* event) {
  DSFP4_TRY(cudaStreamWaitEvent(stream_of(device, queue), static_cast<cudaEvent_t>(event), 0));
  return true;
}

bool event_passed(Device*, void* event, bool* passed) {
  const cudaError_t code = cudaEventQuery(static_cast<cudaEvent_t>(event));
  *passed = code == cudaSuccess;
  if (code == cudaSuccess) return true;
  if (code != cudaErrorNotReady) return fail(code, "cudaEventQuery(event)", __FILE__, __LINE__);
  cudaGetLastError();  // it was no failure
  return true;
}

bool wait_event(Device*, void* event) {
  DSFP4_TRY(cudaEventSynchronize(static_cast<cudaEvent_t>(event)));
  return true;
}

// In a stream of its own, which is always empty.
bool set_clock(Device* device) {
  if (device->clock_stream == nullptr) {
    DSFP4_TRY(cudaStreamCreateWithFlags(&device->clock_stream, cudaStreamNonBlocking));
  }
  if (device->clock == nullptr) DSFP4_TRY(cudaEventCreate(&device->clock));
  DSFP4_TRY(cudaEventRecord(device->clock, device->clock_stream));
  DSFP4_TRY(cudaEventSynchronize(device->clock));
  return true;
}

bool event_time(Device* device, void* event, double* seconds) {
  float milliseconds = 0.0f;
  DSFP4_TRY(cudaEventElapsedTime(&milliseconds, device->clock, static_cast<cudaEvent_t>(event)));
  *seconds = milliseconds * 1e-3;
  return true;
}

// ---- graphs
// --------------------------------------------------------------------------------------

bool begin_capture(Device* device) {
  DSFP4_TRY(cudaStreamBeginCapture(device->stream, cudaStreamCaptureModeThreadLocal));
  return true;
}

bool end_capture(Device* device, void** graph) {
  cudaGraph_t recorded = nullptr;
  DSFP4_TRY(cudaStreamEndCapture(device->stream, &recorded));
  cudaGraphExec_t ready = nullptr;
  const cudaError_t code = cudaGraphInstantiate(&ready, recorded, 0);
  cudaGraphDestroy(recorded);
  if (code != cudaSuccess) return fail(code, "cudaGraphInstantiate", __FILE__, __LINE__);
  *graph = ready;
  return true;
}

bool launch_graph(Device* device, void* graph) {
  DSFP4_TRY(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), device->stream));
  return true;
}

void* stream(Device* device) { return device->stream; }

bool free_graph(Device*, void* graph) {
  DSFP4_TRY(cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph)));
  return true;
}

// Functions without with<> call nothing of CUDA, or see to the caller's device themselves.
constexpr Plugin kPlugin{
    .version = kAbiVersion,
    .bytes = sizeof(Plugin),
    .failure = failure,
    .probe = probe,
    .open = open,
    .close = with<close>,
    .use_ring = with<use_ring>,
    .memory = with<memory>,
    .allocate = with<allocate>,
    .free = with<free_memory>,
    .pin = with<pin>,
    .unpin = with<unpin>,
    .upload = with<upload>,
    .download = with<download>,
    .copy_in = with<copy_in>,
    .copy_out = with<copy_out>,
    .synchronize = with<synchronize>,
    .make_event = with<make_event>,
    .free_event = with<free_event>,
    .record = with<record>,
    .wait = with<wait>,
    .event_passed = with<event_passed>,
    .wait_event = with<wait_event>,
    .set_clock = with<set_clock>,
    .event_time = with<event_time>,
    .stream = stream,
    .embed = with<embed>,
    .rms_norm = with<rms_norm>,
    .silu_mul = with<silu_mul>,
    .zero = with<zero>,
    .add = with<add>,
    .rope = with<rope>,
    .combine = with<combine>,
    .route = with<route>,
    .linear = with<linear>,
    .linear_pair = with<linear_pair>,
    .kv_append = with<kv_append>,
    .mla_inputs = with<mla_inputs>,
    .prefill_attention = with<prefill_attention>,
    .absorb_query = with<absorb_query>,
    .latent_attention = with<latent_attention>,
    .expand_value = with<expand_value>,
    .routed_experts = with<routed_experts>,
    .takes_shared = takes_shared,
    .expert_tasks = with<expert_tasks>,
    .add_expert_tasks = with<add_expert_tasks>,
    .sample = with<sample>,
    .begin_capture = with<begin_capture>,
    .end_capture = with<end_capture>,
    .launch_graph = with<launch_graph>,
    .free_graph = with<free_graph>,
    .read_all = with<read_all>,
    .multiply_loop = with<multiply_loop>,
    .mark = with<mark>,
    .elapsed = with<elapsed>,
};

}  // namespace

std::byte* ring_space(Device* device, std::size_t& bytes, bool whole) {
  std::size_t at = aligned(device->ring_at) % kRingBytes;
  if (whole && bytes > kRingHalf - at % kRingHalf) {
    at = (at / kRingHalf + 1) * kRingHalf % kRingBytes;
  }
  if (at % kRingHalf == 0) {  // on to the other half
    const std::size_t half = at / kRingHalf;
    cudaError_t code = cudaEventRecord(device->ring_left[1 - half], device->stream);
    if (code == cudaSuccess) code = cudaEventSynchronize(device->ring_left[half]);
    if (code != cudaSuccess) {
      fail(code, "cudaEventRecord / cudaEventSynchronize", __FILE__, __LINE__);
      return nullptr;
    }
  }
  bytes = std::min(bytes, kRingHalf - at % kRingHalf);
  device->ring_at = (at + bytes) % kRingBytes;
  return device->ring + at;
}

bool fail(cudaError_t code, const char* call, const char* source, int line) {
  cudaGetLastError();  // what can be forgotten is
  last_failure = {static_cast<int>(code), line, call, source, cudaGetErrorString(code)};
  return false;
}

}  // namespace dsfp4::ops::cuda

extern "C" __attribute__((visibility("default"))) const dsfp4::ops::cuda::Plugin* dsfp4_cuda_plugin(
    std::uint32_t version) {
  using namespace dsfp4::ops::cuda;
  return version == kAbiVersion ? &kPlugin : nullptr;
}
