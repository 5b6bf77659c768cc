#include "ops/cuda_device.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "dsfp4/error.h"
#include "ops/cuda_plugin.h"
#include "ops/raw.h"

namespace dsfp4::ops {
namespace {

// Left for what the driver takes on its own: kernels loaded at their first use, local memory.
constexpr std::uint64_t kDriverReserve = 64u << 20;

// The device's clock and the host's drift apart, and times are floats of the milliseconds between.
constexpr std::chrono::seconds kClockLasts{1};

// The bytes of this process's context on a device: measured when it is made, by the first device,
// and kept as long as the process. Where that cannot be measured, a generous guess.
std::uint64_t context_bytes(int index, std::uint64_t free_before, std::uint64_t free_after) {
  static std::mutex guard;
  static std::map<int, std::uint64_t> known;
  constexpr std::uint64_t kGuess = 600'000'000;
  const std::lock_guard lock(guard);
  const std::uint64_t measured =
      free_before == 0 ? kGuess : free_before - std::min(free_before, free_after);
  return known.emplace(index, measured).first->second;
}

// The same of an open device; throws MemoryLimitError where `memory_limit` does not hold it.
std::uint64_t checked_context_bytes(const cuda::Plugin& plugin, cuda::Device* device, int index,
                                    std::uint64_t memory_limit, std::uint64_t free_before) {
  std::uint64_t free = 0;
  std::uint64_t total = 0;
  cuda_check(plugin, plugin.memory(device, &free, &total));
  // More than there is: of a whole GPU, where the device is a slice of it (MIG).
  if (free_before > total + total / 8) free_before = 0;
  const std::uint64_t context = context_bytes(index, free_before, free);
  if (memory_limit != 0 && context + kDriverReserve > memory_limit) {
    throw MemoryLimitError("the CUDA context and its reserve", context + kDriverReserve,
                           memory_limit, "", "VRAM");
  }
  return context;
}

CudaAccount& account_of(int index) {
  static std::mutex guard;
  static std::map<int, CudaAccount> accounts;
  const std::lock_guard lock(guard);
  return accounts[index];
}

}  // namespace

void cuda_check(const cuda::Plugin& plugin, bool ok) {
  if (ok) return;
  const cuda::Failure& failure = *plugin.failure();
  throw CudaError(failure.problem, failure.code, failure.call, failure.source, failure.line);
}

// ---- memory
// --------------------------------------------------------------------------------------

std::size_t CudaMemory::available() const noexcept {
  const std::lock_guard lock(account_.mutex);
  return available_locked();
}

std::size_t CudaMemory::available_locked() const noexcept {
  std::uint64_t free = 0;
  std::uint64_t total = 0;
  if (!plugin_.memory(device_, &free, &total)) return 0;
  const std::uint64_t left = free > kDriverReserve ? free - kDriverReserve : 0;
  if (limit_ == 0) return left;
  const std::uint64_t taken = context_bytes_ + account_.used + kDriverReserve;
  return std::min(left, limit_ > taken ? limit_ - taken : 0);
}

std::byte* CudaMemory::allocate(std::size_t bytes) noexcept {
  const std::lock_guard lock(account_.mutex);
  if (bytes > available_locked()) return nullptr;
  std::byte* memory = nullptr;
  if (!plugin_.allocate(device_, bytes, &memory)) return nullptr;
  account_.used += bytes;
  return memory;
}

void CudaMemory::release(std::byte* memory, std::size_t bytes) noexcept {
  plugin_.free(device_, memory);
  const std::lock_guard lock(account_.mutex);
  account_.used -= bytes;
}

std::byte* CudaMemory::take(std::size_t bytes, const char* purpose) {
  std::byte* memory = allocate(bytes);
  if (memory == nullptr) throw MemoryLimitError(purpose, bytes, available(), "", name());
  return memory;
}

const char* CudaPinner::pin(std::byte* memory, std::size_t bytes) noexcept {
  return plugin_.pin(device_, memory, bytes) ? nullptr : plugin_.failure()->problem;
}

bool CudaPinner::unpin(std::byte* memory) noexcept { return plugin_.unpin(device_, memory); }

// ---- the device
// ----------------------------------------------------------------------------------

OpenDevice::OpenDevice(const cuda::Plugin& plugin, int index, bool portable) : plugin_(plugin) {
  cuda_check(plugin, plugin.open(index, portable, &device_));
}

CudaDevice::CudaDevice(const cuda::Plugin& plugin, int index, std::uint64_t memory_limit)
    : CudaDevice(plugin, index, memory_limit, cuda_device(plugin, index).free_bytes) {}

CudaDevice::CudaDevice(const cuda::Plugin& plugin, int index, std::uint64_t memory_limit,
                       std::uint64_t free_before)
    : plugin_(plugin),
      device_(plugin, index, cuda_kernels_are_portable()),
      memory_(plugin, device_, account_of(index), memory_limit,
              checked_context_bytes(plugin, device_, index, memory_limit, free_before)),
      pinner_(plugin, device_),
      staging_(pinner_),
      ring_(cuda::kRingBytes, "uploads on their way", staging_) {
  check(plugin.use_ring(device_, memory::on_host(staging_, ring_.take(cuda::kRingBytes))));
}

// A copy from the ring may be under way. After an error of the device there is none.
CudaDevice::~CudaDevice() { plugin_.synchronize(device_); }

void CudaDevice::refuse_capture(const char* call) const {
  if (capturing()) throw CudaError(std::string(call) + " cannot be recorded: it is not an op");
}

std::unique_lock<std::mutex> CudaDevice::use(Queue queue, const char* call) {
  if (queue != Queue::kCompute) return {};
  refuse_capture(call);
  return std::unique_lock(compute_);
}

// upload() and download() belong to the thread of the ops, which is the one that records.
void CudaDevice::upload(const void* from, DevicePtr<void> to, std::size_t bytes) {
  refuse_capture("upload()");
  check(plugin_.upload(device_, from, unwrap(to), bytes));
}

void CudaDevice::download(DevicePtr<const void> from, void* to, std::size_t bytes) {
  refuse_capture("download()");
  check(plugin_.download(device_, unwrap(from), to, bytes));
}

void CudaDevice::copy_in(Queue queue, const void* staged, DevicePtr<void> to, std::size_t bytes) {
  const auto used = use(queue, "copy_in()");
  check(plugin_.copy_in(device_, queue, staged, unwrap(to), bytes));
}

void CudaDevice::copy_out(Queue queue, DevicePtr<const void> from, void* staged,
                          std::size_t bytes) {
  const auto used = use(queue, "copy_out()");
  check(plugin_.copy_out(device_, queue, unwrap(from), staged, bytes));
}

Event CudaDevice::make_event() {
  void* event = nullptr;
  check(plugin_.make_event(device_, false, &event));
  return {*this, event};
}

Event CudaDevice::make_timed_event() {
  void* event = nullptr;
  check(plugin_.make_event(device_, true, &event));
  return {*this, event};
}

Device::Clock::time_point CudaDevice::time_of(const Event& event) {
  refuse_capture("time_of()");
  if (event.handle() == nullptr) throw std::logic_error("time_of() no event");
  const std::lock_guard lock(clock_);
  const auto before = Clock::now();
  if (clock_set_ == Clock::time_point() || before - clock_set_ > kClockLasts) {
    // The first call makes what the others use, so it takes longer than setting the clock does.
    if (clock_set_ == Clock::time_point()) check(plugin_.set_clock(device_));
    const auto begun = Clock::now();
    check(plugin_.set_clock(device_));
    clock_set_ = begun + (Clock::now() - begun) / 2;
  }
  double seconds = 0.0;
  check(plugin_.event_time(device_, event.handle(), &seconds));
  return clock_set_ + std::chrono::round<Clock::duration>(std::chrono::duration<double>(seconds));
}

void CudaDevice::free_event(void* handle) noexcept { plugin_.free_event(device_, handle); }

void CudaDevice::record(Queue queue, const Event& event) {
  if (event.handle() == nullptr) throw std::logic_error("record() of no event");
  const auto used = use(queue, "record()");
  check(plugin_.record(device_, queue, event.handle()));
}

void CudaDevice::wait(Queue queue, const Event& event) {
  const auto used = use(queue, "wait()");
  if (event.handle() != nullptr) check(plugin_.wait(device_, queue, event.handle()));
}

bool CudaDevice::passed(const Event& event) {
  refuse_capture("passed()");
  bool passed = true;
  if (event.handle() != nullptr) check(plugin_.event_passed(device_, event.handle(), &passed));
  return passed;
}

void CudaDevice::wait_for(const Event& event) {
  refuse_capture("wait_for()");
  if (event.handle() != nullptr) check(plugin_.wait_event(device_, event.handle()));
}

void CudaDevice::synchronize() {
  const auto used = use(Queue::kCompute, "synchronize()");
  check(plugin_.synchronize(device_));
}

// ---- recording
// -----------------------------------------------------------------------------------

CudaDevice::Capture::Capture(CudaDevice& device)
    : device_(device), compute_(device.use(Queue::kCompute, "a recording")) {
  device_.check(device_.plugin_.begin_capture(device_.device_));
  device_.capturing_.store(std::this_thread::get_id());
}

bool CudaDevice::Capture::stop(void** graph) noexcept {
  device_.capturing_.store({});
  const bool ok = device_.plugin_.end_capture(device_.device_, graph);
  compute_.unlock();
  return ok;
}

void* CudaDevice::Capture::end() {
  void* graph = nullptr;
  device_.check(stop(&graph));
  return graph;
}

CudaDevice::Capture::~Capture() {
  if (!compute_.owns_lock()) return;
  void* graph = nullptr;
  if (stop(&graph)) device_.plugin_.free_graph(device_.device_, graph);
}

}  // namespace dsfp4::ops
