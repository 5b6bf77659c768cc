// What the CUDA backend leaves behind when a call fails: needs no GPU.
#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "ops/cuda_backend.h"
#include "ops/fake_cuda.h"

namespace dsfp4::ops {
namespace {

using testing::FakeCuda;

TEST(CudaBackendFaults, ADeviceIsClosedWhateverEndsItsConstruction) {
  const cuda::Plugin& plugin = FakeCuda::plugin();
  FakeCuda& fake = FakeCuda::state();
  { const CudaBackend backend(plugin, FakeCuda::kIndex, 0); }
  EXPECT_EQ(fake.devices, 0);
  EXPECT_THROW(CudaBackend(plugin, FakeCuda::kIndex, 1), MemoryLimitError);
  EXPECT_EQ(fake.devices, 0);
  fake.tells_memory = false;
  EXPECT_THROW(CudaBackend(plugin, FakeCuda::kIndex, 0), CudaError);
  EXPECT_EQ(fake.devices, 0);
  fake.opens = false;
  EXPECT_THROW(CudaBackend(plugin, FakeCuda::kIndex, 0), CudaError);
  EXPECT_EQ(fake.devices, 0);
}

}  // namespace
}  // namespace dsfp4::ops
