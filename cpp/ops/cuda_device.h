// An NVIDIA GPU as a device: its memory within a limit, copies, queues and events, in terms of the
// plugin's table.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>

#include "memory/arena.h"
#include "memory/pinned_memory.h"
#include "ops/cuda/abi.h"
#include "ops/device.h"

namespace dsfp4::ops {

/// Throws what the last failure of the plugin's table was, if `ok` is false.
void cuda_check(const cuda::Plugin& plugin, bool ok);

/// A device's memory that all models of the process have taken, in bytes.
struct CudaAccount {
  std::mutex mutex;
  std::uint64_t used = 0;
};

/// Device memory within a limit. The limit holds for what the whole process takes on the device:
/// the context, and everything that came through here, for this model or another one.
class CudaMemory final : public memory::MemorySource {
 public:
  /// `context_bytes` are gone already.
  CudaMemory(const cuda::Plugin& plugin, cuda::Device* device, CudaAccount& account,
             std::uint64_t limit, std::uint64_t context_bytes)
      : plugin_(plugin),
        device_(device),
        account_(account),
        limit_(limit),
        context_bytes_(context_bytes) {}

  std::byte* allocate(std::size_t bytes) noexcept override;
  void release(std::byte* memory, std::size_t bytes) noexcept override;
  bool host_accessible() const noexcept override { return false; }
  const char* name() const noexcept override { return "VRAM"; }
  std::size_t available() const noexcept override;

  /// As allocate(), but throws MemoryLimitError with `purpose`.
  std::byte* take(std::size_t bytes, const char* purpose);

 private:
  std::size_t available_locked() const noexcept;

  const cuda::Plugin& plugin_;
  cuda::Device* device_;
  CudaAccount& account_;
  std::uint64_t limit_;
  std::uint64_t context_bytes_;
};

class CudaPinner final : public memory::Pinner {
 public:
  CudaPinner(const cuda::Plugin& plugin, cuda::Device* device) : plugin_(plugin), device_(device) {}

  const char* pin(std::byte* memory, std::size_t bytes) noexcept override;
  bool unpin(std::byte* memory) noexcept override;

 private:
  const cuda::Plugin& plugin_;
  cuda::Device* device_;
};

/// An open device of the plugin.
class OpenDevice {
 public:
  /// Throws CudaError.
  OpenDevice(const cuda::Plugin& plugin, int index, bool portable);
  ~OpenDevice() { plugin_.close(device_); }
  OpenDevice(const OpenDevice&) = delete;
  OpenDevice& operator=(const OpenDevice&) = delete;
  // NOLINTNEXTLINE(google-explicit-constructor): it stands for the device in the plugin's calls
  operator cuda::Device*() const noexcept { return device_; }

 private:
  const cuda::Plugin& plugin_;
  cuda::Device* device_ = nullptr;
};

class CudaDevice final : public Device {
 public:
  /// Throws CudaError, and MemoryLimitError where `memory_limit` (bytes, 0 for none) does not hold
  /// the context.
  CudaDevice(const cuda::Plugin& plugin, int index, std::uint64_t memory_limit);

  ~CudaDevice() override;

  CudaMemory& memory() override { return memory_; }
  memory::MemorySource& staging() override { return staging_; }

  void upload(const void* from, DevicePtr<void> to, std::size_t bytes) override;
  void download(DevicePtr<const void> from, void* to, std::size_t bytes) override;
  void copy_in(Queue queue, const void* staged, DevicePtr<void> to, std::size_t bytes) override;
  void copy_out(Queue queue, DevicePtr<const void> from, void* staged, std::size_t bytes) override;

  Event make_event() override;
  void record(Queue queue, const Event& event) override;
  void wait(Queue queue, const Event& event) override;
  bool passed(const Event& event) override;
  Event make_timed_event() override;
  Clock::time_point time_of(const Event& event) override;
  void wait_for(const Event& event) override;
  void synchronize() override;

  /// For calls of the plugin's table.
  cuda::Device* opened() const noexcept { return device_; }
  /// The stream of kCompute, a cudaStream_t.
  void* stream() const { return plugin_.stream(device_); }

  /// While it lives, ops of its thread are recorded, not run. Whatever else that thread asks of
  /// kCompute then throws CudaError; other threads' calls for that queue wait until it has ended.
  class Capture {
   public:
    explicit Capture(CudaDevice& device);
    /// Gives up what was recorded, unless it was ended.
    ~Capture();
    Capture(const Capture&) = delete;
    Capture& operator=(const Capture&) = delete;
    /// The recording, a cudaGraphExec_t; the caller frees it.
    void* end();

   private:
    bool stop(void** graph) noexcept;

    CudaDevice& device_;
    std::unique_lock<std::mutex> compute_;
  };
  /// True where the calling thread records.
  bool capturing() const noexcept { return capturing_.load() == std::this_thread::get_id(); }

 private:
  CudaDevice(const cuda::Plugin& plugin, int index, std::uint64_t memory_limit,
             std::uint64_t free_before);
  void check(bool ok) const { cuda_check(plugin_, ok); }
  /// Throws CudaError if the calling thread records.
  void refuse_capture(const char* call) const;
  /// Keeps `queue` from being recorded while a call of it is made.
  std::unique_lock<std::mutex> use(Queue queue, const char* call);
  void free_event(void* handle) noexcept override;

  const cuda::Plugin& plugin_;
  OpenDevice device_;
  CudaMemory memory_;
  CudaPinner pinner_;
  memory::PinnedMemory staging_;
  memory::Arena ring_;  // of the plugin's uploads
  std::mutex compute_;  // a call in that queue would end another thread's recording in an error
  std::atomic<std::thread::id> capturing_{};
  std::mutex clock_;
  Clock::time_point clock_set_{};  // the host's time of the device's last set_clock()
};

}  // namespace dsfp4::ops
