// A GPU that is cut into slices (MIG), by a driver that is a table of functions: which memory
// counts as the device's, and how what cannot be found is named.
#include <array>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <string>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "ops/cuda/nvml.h"
#include "ops/cuda_device.h"
#include "ops/cuda_plugin.h"
#include "ops/fake_cuda.h"

namespace dsfp4::ops {
namespace {

using cuda::Nvml;
using cuda::NvmlMemory;

constexpr const char* kBus = "0000:07:00.0";
constexpr std::array<unsigned char, 16> kUuid = {0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef,
                                                 0xff, 0xee, 0xdd, 0xcc, 0xbb, 0xaa, 0x99, 0x88};
constexpr const char* kName = "MIG-01234567-89ab-cdef-ffee-ddccbbaa9988";
constexpr const char* kOldName = "MIG-GPU-aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee/7/0";

// The whole GPU and its slices, as NVML tells them apart.
struct FakeNvml {
  bool mig = true;
  bool knows_mig = true;  // older drivers and GPUs answer "not supported"
  std::map<std::string, unsigned long long> slices = {{kName, 4'900'000'000}};
  unsigned long long whole = 41'000'000'000;
  int users = 0;
  int inits = 0;
  std::map<void*, unsigned long long> handles;

  static FakeNvml& state() {
    static FakeNvml fake;
    return fake;
  }
  static Nvml table() {
    state() = {};
    Nvml nvml;
    nvml.init = [] {
      ++state().inits;
      return ++state().users, 0;
    };
    nvml.shutdown = [] { return --state().users, 0; };
    nvml.find_by_bus = [](const char* bus, void** device) {
      if (std::string(bus) != kBus) return 6;
      *device = &state().whole;
      state().handles[*device] = state().whole;
      return 0;
    };
    nvml.find_by_uuid = [](const char* uuid, void** device) {
      const auto found = state().slices.find(uuid);
      if (found == state().slices.end()) return 6;
      *device = &found->second;
      state().handles[*device] = found->second;
      return 0;
    };
    nvml.mig_mode = [](void*, unsigned* current, unsigned* pending) {
      if (!state().knows_mig) return 3;
      *current = *pending = state().mig ? 1 : 0;
      return 0;
    };
    nvml.memory = [](void* device, NvmlMemory* memory) {
      *memory = {state().handles.at(device), state().handles.at(device), 0};
      return 0;
    };
    return nvml;
  }
};

std::uint64_t free_bytes(const Nvml& nvml, const char* visible = "") {
  const std::uint64_t bytes = cuda::free_without_context(nvml, kBus, kUuid, visible);
  EXPECT_EQ(FakeNvml::state().users, 0) << "not shut down";
  return bytes;
}

TEST(Mig, AWholeGpuIsFoundByItsBus) {
  const Nvml nvml = FakeNvml::table();
  FakeNvml::state().mig = false;
  EXPECT_EQ(free_bytes(nvml), 41'000'000'000u);
  FakeNvml::state().knows_mig = false;
  EXPECT_EQ(free_bytes(nvml), 41'000'000'000u);
  Nvml older = nvml;
  older.mig_mode = nullptr;
  EXPECT_EQ(free_bytes(older), 41'000'000'000u);
}

TEST(Mig, ASliceHasItsOwnMemory) {
  const Nvml nvml = FakeNvml::table();
  EXPECT_EQ(cuda::mig_name(kUuid), kName);
  EXPECT_EQ(free_bytes(nvml), 4'900'000'000u);
}

TEST(Mig, ASliceIsFoundByItsNameInTheEnvironment) {
  const Nvml nvml = FakeNvml::table();
  FakeNvml::state().slices = {{kOldName, 9'800'000'000}};
  EXPECT_EQ(free_bytes(nvml, kOldName), 9'800'000'000u);
  EXPECT_EQ(free_bytes(nvml, "0"), 0u);
}

// Never the whole GPU's, which would be taken for a context of as many bytes.
TEST(Mig, ASliceThatIsNotFoundIsNotKnown) {
  Nvml nvml = FakeNvml::table();
  FakeNvml::state().slices.clear();
  EXPECT_EQ(free_bytes(nvml), 0u);
  EXPECT_EQ(free_bytes(nvml, kName), 0u);
  nvml.find_by_uuid = nullptr;
  EXPECT_EQ(free_bytes(nvml), 0u);
}

TEST(Mig, ADriverWithoutTheLibraryOrTheGpuIsNotKnown) {
  EXPECT_EQ(free_bytes(Nvml{}), 0u);
  Nvml nvml = FakeNvml::table();
  EXPECT_EQ(cuda::free_without_context(nvml, "0000:08:00.0", kUuid, ""), 0u);
  EXPECT_EQ(FakeNvml::state().inits, 1);
  EXPECT_EQ(FakeNvml::state().users, 0);
  nvml.init = [] { return 1; };
  EXPECT_EQ(free_bytes(nvml), 0u);
}

TEST(Mig, DevicesOfAList) {
  EXPECT_EQ(cuda::visible_device("MIG-a,MIG-b", 0), "MIG-a");
  EXPECT_EQ(cuda::visible_device("MIG-a,MIG-b", 1), "MIG-b");
  EXPECT_EQ(cuda::visible_device("MIG-a,MIG-b", 2), "");
  EXPECT_EQ(cuda::visible_device("", 0), "");
  EXPECT_EQ(cuda::visible_device("3", 0), "3");
}

// A slice of 1.9 GB whose plugin was told of the whole GPU's 41 GB: the context is no 39 GB.
TEST(Mig, TheContextOfASliceIsNotTheRestOfTheGpu) {
  const cuda::Plugin& plugin = testing::FakeCuda::plugin();
  testing::FakeCuda::state().free_before = 41'000'000'000;
  CudaDevice device(plugin, testing::FakeCuda::kIndex - 1, 1'800'000'000);
  EXPECT_GT(device.memory().available(), 1'000'000'000u);
  EXPECT_LT(device.memory().available(), 1'300'000'000u);  // 600 MB for the context, a reserve
}

TEST(Mig, WhatIsNotSeenIsNamedWithItsEnvironment) {
  const char* before = std::getenv("CUDA_VISIBLE_DEVICES");
  const std::string kept = before == nullptr ? "" : before;
  cuda::DeviceInfo info;
  info.driver_version = info.runtime_version = 13000;
  ::setenv("CUDA_VISIBLE_DEVICES", kName, 1);
  EXPECT_NE(cuda_refusal(info, 0).find(std::string("the driver sees none (CUDA_VISIBLE_DEVICES is "
                                                   "'") +
                                       kName + "')"),
            std::string::npos)
      << cuda_refusal(info, 0);
  info.count = 1;
  EXPECT_NE(cuda_refusal(info, 1).find("CUDA_VISIBLE_DEVICES"), std::string::npos);
  ::unsetenv("CUDA_VISIBLE_DEVICES");
  EXPECT_EQ(cuda_refusal(info, 1).find("CUDA_VISIBLE_DEVICES"), std::string::npos);
  if (before != nullptr) ::setenv("CUDA_VISIBLE_DEVICES", kept.c_str(), 1);
}

}  // namespace
}  // namespace dsfp4::ops
