// The table that the core loads, and what is not a kernel: the device, its memory, graphs.
#include <cstring>
#include <dlfcn.h>
#include <sys/mman.h>

#include "ops/cuda/common.cuh"
#include "ops/cuda/kernels.h"

namespace dsfp4::ops::cuda {
namespace {

constexpr std::size_t kRingBytes = 4u << 20;
constexpr std::size_t kHugePage = 2u << 20;

thread_local Failure last_failure;

const Failure* failure() { return &last_failure; }

// ---- NVML: used memory before there is a context
// -------------------------------------------------

struct NvmlMemory {
  unsigned long long total, free, used;
};

// Free bytes of the device on this PCI bus; 0 where the driver's management library is not there.
std::uint64_t free_without_context(const char* bus) {
  void* library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return 0;
  const auto init = reinterpret_cast<int (*)()>(dlsym(library, "nvmlInit_v2"));
  const auto find = reinterpret_cast<int (*)(const char*, void**)>(
      dlsym(library, "nvmlDeviceGetHandleByPciBusId_v2"));
  const auto memory =
      reinterpret_cast<int (*)(void*, NvmlMemory*)>(dlsym(library, "nvmlDeviceGetMemoryInfo"));
  const auto shutdown = reinterpret_cast<int (*)()>(dlsym(library, "nvmlShutdown"));
  std::uint64_t free = 0;
  if (init != nullptr && find != nullptr && memory != nullptr && shutdown != nullptr &&
      init() == 0) {
    void* handle = nullptr;
    NvmlMemory info{};
    if (find(bus, &handle) == 0 && memory(handle, &info) == 0) free = info.free;
    shutdown();
  }
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
  info->free_bytes = free_without_context(bus);
  return true;
}

bool open(int index, [[maybe_unused]] bool portable, Device** device) {
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
  cudaError_t code = cudaStreamCreateWithFlags(&opened->stream, cudaStreamNonBlocking);
  if (code == cudaSuccess) code = cudaHostAlloc(&opened->ring, kRingBytes, cudaHostAllocDefault);
  if (code != cudaSuccess) {
    if (opened->stream != nullptr) cudaStreamDestroy(opened->stream);
    delete opened;
    return fail(code, "cudaStreamCreateWithFlags / cudaHostAlloc", __FILE__, __LINE__);
  }
  *device = opened;
  return true;
}

void close(Device* device) {
  cudaSetDevice(device->index);
  for (cudaEvent_t event : device->marks) {
    if (event != nullptr) cudaEventDestroy(event);
  }
  cudaFreeHost(device->ring);
  cudaStreamDestroy(device->stream);
  delete device;
}

bool memory(Device* device, std::uint64_t* free, std::uint64_t* total) {
  DSFP4_TRY(cudaSetDevice(device->index));
  std::size_t free_bytes = 0;
  std::size_t total_bytes = 0;
  DSFP4_TRY(cudaMemGetInfo(&free_bytes, &total_bytes));
  *free = free_bytes;
  *total = total_bytes;
  return true;
}

bool allocate(Device* device, std::size_t bytes, std::byte** memory) {
  DSFP4_TRY(cudaSetDevice(device->index));
  DSFP4_TRY(cudaMalloc(memory, bytes));
  return true;
}

bool free_memory(Device* device, std::byte* memory) {
  DSFP4_TRY(cudaSetDevice(device->index));
  DSFP4_TRY(cudaFree(memory));
  return true;
}

bool allocate_pinned(Device* device, std::size_t bytes, std::byte** memory) {
  DSFP4_TRY(cudaSetDevice(device->index));
  const std::size_t mapped = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* pages = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) return fail(cudaErrorMemoryAllocation, "mmap", __FILE__, __LINE__);
  madvise(pages, mapped, MADV_HUGEPAGE);  // only a wish
  const cudaError_t code = cudaHostRegister(pages, mapped, cudaHostRegisterDefault);
  if (code != cudaSuccess) {
    munmap(pages, mapped);
    return fail(code, "cudaHostRegister(pages, mapped, cudaHostRegisterDefault)", __FILE__,
                __LINE__);
  }
  *memory = static_cast<std::byte*>(pages);
  return true;
}

bool free_pinned(Device* device, std::byte* memory, std::size_t bytes) {
  DSFP4_TRY(cudaSetDevice(device->index));
  DSFP4_TRY(cudaHostUnregister(memory));
  munmap(memory, (bytes + kHugePage - 1) / kHugePage * kHugePage);
  return true;
}

bool upload(Device* device, const void* host, void* to, std::size_t bytes, bool pinned) {
  DSFP4_TRY(cudaSetDevice(device->index));
  if (pinned) {
    DSFP4_TRY(cudaMemcpyAsync(to, host, bytes, cudaMemcpyHostToDevice, device->stream));
    return true;
  }
  // Through the ring; once round, what is in flight must be over.
  const auto* from = static_cast<const std::byte*>(host);
  auto* destination = static_cast<std::byte*>(to);
  while (bytes > 0) {
    if (device->ring_at == kRingBytes) {
      DSFP4_TRY(cudaStreamSynchronize(device->stream));
      device->ring_at = 0;
    }
    const std::size_t piece = std::min(bytes, kRingBytes - device->ring_at);
    std::memcpy(device->ring + device->ring_at, from, piece);
    DSFP4_TRY(cudaMemcpyAsync(destination, device->ring + device->ring_at, piece,
                              cudaMemcpyHostToDevice, device->stream));
    device->ring_at += piece;
    from += piece;
    destination += piece;
    bytes -= piece;
  }
  return true;
}

bool download(Device* device, const void* from, void* host, std::size_t bytes) {
  DSFP4_TRY(cudaSetDevice(device->index));
  DSFP4_TRY(cudaMemcpyAsync(host, from, bytes, cudaMemcpyDeviceToHost, device->stream));
  DSFP4_TRY(cudaStreamSynchronize(device->stream));
  return true;
}

bool synchronize(Device* device) {
  DSFP4_TRY(cudaSetDevice(device->index));
  DSFP4_TRY(cudaStreamSynchronize(device->stream));
  return true;
}

// ---- graphs
// --------------------------------------------------------------------------------------

bool begin_capture(Device* device) {
  DSFP4_TRY(cudaSetDevice(device->index));
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
  DSFP4_TRY(cudaSetDevice(device->index));
  DSFP4_TRY(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), device->stream));
  return true;
}

void* stream_of(Device* device) { return device->stream; }

bool free_graph(Device* device, void* graph) {
  DSFP4_TRY(cudaSetDevice(device->index));
  DSFP4_TRY(cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph)));
  return true;
}

constexpr Plugin kPlugin{
    .version = kAbiVersion,
    .bytes = sizeof(Plugin),
    .failure = failure,
    .probe = probe,
    .open = open,
    .close = close,
    .memory = memory,
    .allocate = allocate,
    .free = free_memory,
    .allocate_pinned = allocate_pinned,
    .free_pinned = free_pinned,
    .upload = upload,
    .download = download,
    .synchronize = synchronize,
    .stream = stream_of,
    .embed = embed,
    .rms_norm = rms_norm,
    .silu_mul = silu_mul,
    .zero = zero,
    .add = add,
    .rope = rope,
    .combine = combine,
    .route = route,
    .linear_workspace = linear_workspace,
    .linear = linear,
    .linear_pair = linear_pair,
    .kv_append = kv_append,
    .mla_inputs = mla_inputs,
    .prefill_workspace = prefill_workspace,
    .prefill_attention = prefill_attention,
    .absorb_query = absorb_query,
    .latent_workspace = latent_workspace,
    .latent_attention = latent_attention,
    .expand_value = expand_value,
    .experts_workspace = experts_workspace,
    .routed_experts = routed_experts,
    .takes_shared = takes_shared,
    .sample_workspace = sample_workspace,
    .sample = sample,
    .begin_capture = begin_capture,
    .end_capture = end_capture,
    .launch_graph = launch_graph,
    .free_graph = free_graph,
    .read_all = read_all,
    .multiply_loop = multiply_loop,
    .mark = mark,
    .elapsed = elapsed,
};

}  // namespace

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
