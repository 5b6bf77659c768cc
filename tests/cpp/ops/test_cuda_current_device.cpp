// The caller's current device, a context of the driver, is the caller's after every call.
#include <dlfcn.h>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "memory/source.h"
#include "ops/cuda_backend.h"
#include "ops/cuda_fixture.h"

namespace dsfp4::ops {
namespace {

using Context = void*;

// The driver's functions that a program beside this one calls.
class Driver {
 public:
  Context current() const {
    Context context = nullptr;
    EXPECT_EQ(entry<int(Context*)>("cuCtxGetCurrent")(&context), 0);
    return context;
  }
  void make_current(Context context) const {
    EXPECT_EQ(entry<int(Context)>("cuCtxSetCurrent")(context), 0);
  }
  /// A context of its own on device 0, current now.
  Context create() const {
    Context context = nullptr;
    EXPECT_EQ(entry<int(Context*, unsigned, int)>("cuCtxCreate_v2")(&context, 0, 0), 0);
    return context;
  }
  void destroy(Context context) const {
    EXPECT_EQ(entry<int(Context)>("cuCtxDestroy_v2")(context), 0);
  }
  Context retain_primary(int device) const {
    Context context = nullptr;
    EXPECT_EQ(entry<int(Context*, int)>("cuDevicePrimaryCtxRetain")(&context, device), 0);
    return context;
  }
  void release_primary(int device) const {
    EXPECT_EQ(entry<int(int)>("cuDevicePrimaryCtxRelease_v2")(device), 0);
  }

 private:
  template <typename Function>
  Function* entry(const char* name) const {
    void* found = dlsym(library_, name);
    EXPECT_NE(found, nullptr) << name;
    return reinterpret_cast<Function*>(found);
  }

  void* library_ = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
};

class CudaCurrentDevice : public Cuda {
 protected:
  // Calls of every kind, in a new thread in which `context` is current.
  void expect_kept(Context context) {
    std::thread([&] {
      driver_.make_current(context);
      const cuda::Plugin& plugin = cuda_plugin();
      const auto expect_current = [&](const char* after) {
        EXPECT_EQ(driver_.current(), context) << "after " << after;
      };
      const auto check = [&](const char* call, bool ok) {
        EXPECT_TRUE(ok) << call << ": " << plugin.failure()->call << ", "
                        << plugin.failure()->problem;
        expect_current(call);
      };
      cuda::Device* device = nullptr;
      check("open", plugin.open(0, false, &device));
      if (device == nullptr) return;
      std::uint64_t free = 0;
      std::uint64_t total = 0;
      check("memory", plugin.memory(device, &free, &total));
      std::byte* memory = nullptr;
      std::byte* pinned = memory::host_memory().allocate(4096);
      check("allocate", plugin.allocate(device, 4096, &memory));
      check("pin", plugin.pin(device, pinned, 4096));
      std::vector<std::byte> ring(cuda::kRingBytes);
      check("use_ring", plugin.use_ring(device, ring.data()));
      std::vector<float> values(512, 1.5f);
      check("upload", plugin.upload(device, values.data(), memory, 2048));
      check("copy_in", plugin.copy_in(device, Queue::kUpload, pinned, memory + 2048, 2048));
      void* event = nullptr;
      check("make_event", plugin.make_event(device, true, &event));
      check("record", plugin.record(device, Queue::kUpload, event));
      check("wait", plugin.wait(device, Queue::kCompute, event));
      bool passed = false;
      check("event_passed", plugin.event_passed(device, event, &passed));
      check("wait_event", plugin.wait_event(device, event));
      double seconds = 0.0;
      check("set_clock", plugin.set_clock(device));
      check("event_time", plugin.event_time(device, event, &seconds));
      check("copy_out", plugin.copy_out(device, Queue::kDownload, memory + 2048, pinned, 2048));
      auto* floats = reinterpret_cast<float*>(memory);
      const cuda::Matrix x{floats, 1, 512, 512};
      const cuda::Matrix y{floats + 512, 1, 512, 512};
      check("zero", plugin.zero(device, y));
      void* graph = nullptr;
      check("begin_capture", plugin.begin_capture(device));
      check("add", plugin.add(device, x, y));
      check("end_capture", plugin.end_capture(device, &graph));
      check("launch_graph", plugin.launch_graph(device, graph));
      check("mark", plugin.mark(device, 0));
      check("mark", plugin.mark(device, 1));
      float milliseconds = 0.0f;
      check("elapsed", plugin.elapsed(device, 0, 1, &milliseconds));
      std::vector<float> got(512);
      check("download", plugin.download(device, y.data, got.data(), 2048));
      EXPECT_EQ(got, values);
      check("free_graph", plugin.free_graph(device, graph));
      check("free_event", plugin.free_event(device, event));
      check("synchronize", plugin.synchronize(device));
      check("unpin", plugin.unpin(device, pinned));
      memory::host_memory().release(pinned, 4096);
      check("free", plugin.free(device, memory));
      const cuda::ExpertView none;
      const std::int32_t pair = 0;
      const cuda::ExpertTask of_another_shape{&none, {&pair, 1}};
      EXPECT_FALSE(plugin.expert_tasks(device, &of_another_shape, 1, 1, x, x, y, nullptr));
      expect_current("a call that failed");
      plugin.close(device);
      expect_current("close");
      cuda::DeviceInfo info;
      check("probe", plugin.probe(0, &info));
      driver_.make_current(nullptr);
    }).join();
  }

  const Driver driver_;
};

TEST_F(CudaCurrentDevice, NoneWhereTheCallerHasNone) { expect_kept(nullptr); }

TEST_F(CudaCurrentDevice, AContextOfTheCallersOwn) {
  const Context before = driver_.current();
  const Context own = driver_.create();
  driver_.make_current(before);
  expect_kept(own);
  driver_.destroy(own);
}

TEST_F(CudaCurrentDevice, AnotherGpu) {
  cuda::DeviceInfo info;
  ASSERT_TRUE(cuda_plugin().probe(0, &info));
  if (info.count < 2) GTEST_SKIP() << "needs two GPUs; the driver sees " << info.count;
  const Context other = driver_.retain_primary(1);
  expect_kept(other);
  driver_.release_primary(1);
}

}  // namespace
}  // namespace dsfp4::ops
