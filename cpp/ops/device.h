// A device: its memory, its queues, and how bytes get in and out. What it computes is Ops' part.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <utility>

#include "base/device_ptr.h"
#include "memory/source.h"

namespace dsfp4::ops {

/// Each queue runs its work in order; only events order one against another. Ops run in kCompute.
enum class Queue : std::uint8_t { kCompute, kUpload, kDownload };

class Device;

/// Passes when all that its queue held as it was recorded has run; one never recorded has passed.
/// Its device must outlive it.
class Event {
 public:
  Event() = default;
  Event(Device& device, void* handle) : device_(&device), handle_(handle) {}
  ~Event();
  Event(Event&& other) noexcept
      : device_(std::exchange(other.device_, nullptr)),
        handle_(std::exchange(other.handle_, nullptr)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(handle_, other.handle_);
    return *this;
  }

  /// The device's own; null where the device has nothing to wait for.
  void* handle() const noexcept { return handle_; }

 private:
  Device* device_ = nullptr;
  void* handle_ = nullptr;
};

/// Everything but upload() and download() may be called from any thread.
class Device {
 public:
  virtual ~Device() = default;

  /// Memory for matrices, weights and caches: arenas for them take their block here.
  virtual memory::MemorySource& memory() = 0;
  /// Host memory that copies to and from memory() are fast with, and may be left under way, unless
  /// the system refuses to pin it.
  virtual memory::MemorySource& staging() = 0;
  /// True where the host may touch memory() directly: on_host() says where.
  bool host_visible() { return memory().host_accessible(); }
  /// The host's pointer to memory() of a device that is host_visible(); throws std::logic_error
  /// for another one.
  template <typename T>
  T* on_host(DevicePtr<T> pointer) {
    return memory::on_host(memory(), pointer);
  }

  /// Copies from the host, before the ops that follow; `from` may change once this returns.
  virtual void upload(const void* from, DevicePtr<void> to, std::size_t bytes) = 0;
  /// Copies to the host, after the ops that went before; done when this returns.
  virtual void download(DevicePtr<const void> from, void* to, std::size_t bytes) = 0;

  /// Copies that return at once, or, where their block of staging() is not pinned, perhaps once the
  /// queue has come to them and made them. `staged` lies in one block, and stays as it is, or is
  /// not read, until an event that is recorded afterwards has passed.
  virtual void copy_in(Queue queue, const void* staged, DevicePtr<void> to, std::size_t bytes) = 0;
  virtual void copy_out(Queue queue, DevicePtr<const void> from, void* staged,
                        std::size_t bytes) = 0;

  virtual Event make_event() = 0;
  virtual void record(Queue queue, const Event& event) = 0;
  /// Work that is queued from now on begins when `event` has passed. Holds up the queue, not the
  /// caller. Not inside a segment.
  virtual void wait(Queue queue, const Event& event) = 0;
  virtual bool passed(const Event& event) = 0;

  using Clock = std::chrono::steady_clock;
  /// An event that also notes when it passes, for time_of(). It costs more than another.
  virtual Event make_timed_event() = 0;
  /// When a timed event passed, by the host's clock, to some 10 microseconds. It has been recorded,
  /// and passed() has said so.
  virtual Clock::time_point time_of(const Event& event) = 0;

  /// Holds up the caller until `event` has passed.
  virtual void wait_for(const Event& event) = 0;
  /// Until all queues are empty.
  virtual void synchronize() = 0;

 private:
  friend class Event;
  virtual void free_event(void* handle) noexcept = 0;
};

inline Event::~Event() {
  if (handle_ != nullptr) device_->free_event(handle_);
}

/// The processor: its memory is host_memory(), copies are made at once, and events have passed.
Device& host_device() noexcept;

}  // namespace dsfp4::ops
