// Leftovers of the CUDA backend when a call fails: needs no GPU.
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

TEST(CudaBackendFaults, AStepThatIsRecordedRefusesTasks) {
  CudaBackend backend(FakeCuda::plugin(), FakeCuda::kIndex, 0);
  backend.begin_step(Phase::kDecode);
  const std::int32_t id = 0;
  SequenceRows row;
  row.rows = 1;
  EXPECT_EQ(backend.begin_recorded({&id, 1}, {&row, 1}),
            Backend::StepRecording::kBegun);  // the first of its kind runs as it is
  backend.end_recorded();
  EXPECT_EQ(backend.begin_recorded({&id, 1}, {&row, 1}), Backend::StepRecording::kBegun);
  ASSERT_EQ(FakeCuda::state().recordings, 1);
  const ExpertView expert;
  const std::int32_t pair = 0;
  const ExpertTask task{&expert, {&pair, 1}};
  EXPECT_THROW(backend.experts({&task, 1}, 1, {}, {}, {}), CudaError);
  backend.drop_recorded();
  EXPECT_EQ(FakeCuda::state().recordings, 0);
}

}  // namespace
}  // namespace dsfp4::ops
