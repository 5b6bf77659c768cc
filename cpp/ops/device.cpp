#include "ops/device.h"

#include <cstring>

#include "base/device_access.h"

namespace dsfp4::ops {
namespace {

class HostDevice final : public Device {
 public:
  memory::MemorySource& memory() override { return memory::host_memory(); }
  memory::MemorySource& staging() override { return memory::host_memory(); }
  void upload(const void* from, DevicePtr<void> to, std::size_t bytes) override {
    copy(from, DeviceAccess::address(to), bytes);
  }
  void download(DevicePtr<const void> from, void* to, std::size_t bytes) override {
    copy(DeviceAccess::address(from), to, bytes);
  }
  void copy_in(Queue, const void* staged, DevicePtr<void> to, std::size_t bytes) override {
    upload(staged, to, bytes);
  }
  void copy_out(Queue, DevicePtr<const void> from, void* staged, std::size_t bytes) override {
    download(from, staged, bytes);
  }
  Event make_event() override { return {}; }
  void record(Queue, const Event&) override {}
  void wait(Queue, const Event&) override {}
  bool passed(const Event&) override { return true; }
  Event make_timed_event() override { return {}; }
  Clock::time_point time_of(const Event&) override { return Clock::now(); }
  void wait_for(const Event&) override {}
  void synchronize() override {}

 private:
  static void copy(const void* from, void* to, std::size_t bytes) {
    if (from != to && bytes > 0) std::memcpy(to, from, bytes);
  }
  void free_event(void*) noexcept override {}
};

}  // namespace

Device& host_device() noexcept {
  static HostDevice device;
  return device;
}

}  // namespace dsfp4::ops
