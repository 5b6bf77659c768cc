// What is said of the CUDA plugin and of GPUs that cannot be used: needs neither.
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <unistd.h>

#include <gtest/gtest.h>

#include "dsfp4/error.h"
#include "ops/cuda_plugin.h"

namespace dsfp4::ops {
namespace {

TEST(CudaPlugin, AnUnknownChoiceOfKernelsIsNamed) {
  const char* before = std::getenv("DSFP4_CUDA_KERNELS");
  const std::string kept = before == nullptr ? "" : before;
  ::setenv("DSFP4_CUDA_KERNELS", "portable", 1);
  EXPECT_TRUE(cuda_kernels_are_portable());
  ::setenv("DSFP4_CUDA_KERNELS", "", 1);
  EXPECT_FALSE(cuda_kernels_are_portable());
  ::setenv("DSFP4_CUDA_KERNELS", "protable", 1);
  EXPECT_THROW(cuda_kernels_are_portable(), ParameterError);
  ::setenv("DSFP4_CUDA_KERNELS", kept.c_str(), 1);
}

TEST(CudaPlugin, IsLookedForBesideTheLibraryAndNeverAbove) {
  const auto root =
      std::filesystem::temp_directory_path() / ("dsfp4-plugin-" + std::to_string(::getpid()));
  const auto folder = root / "package";
  std::filesystem::create_directories(folder / "lib");
  const auto put = [](const std::filesystem::path& path) { std::ofstream(path) << "x"; };
  put(root / "libdsfp4_cuda.so");  // whoever may write there must not be run
  EXPECT_EQ(plugin_beside(folder / "_core.so"), folder / "libdsfp4_cuda.so");
  put(folder / "libdsfp4_cuda.so");
  EXPECT_EQ(plugin_beside(folder / "lib" / "libdsfp4.so"), folder / "lib" / "libdsfp4_cuda.so");
  put(folder / "lib" / "libdsfp4_cuda.so");
  EXPECT_EQ(plugin_beside(folder / "_core.so"), folder / "lib" / "libdsfp4_cuda.so");
  EXPECT_EQ(plugin_beside(folder / "lib" / "libdsfp4.so"), folder / "lib" / "libdsfp4_cuda.so");
  std::filesystem::remove_all(root);
}

TEST(CudaPlugin, IsNotSearchedFor) {
  if (std::getenv("DSFP4_CUDA_PLUGIN") != nullptr) GTEST_SKIP() << "DSFP4_CUDA_PLUGIN is set";
  // The message names an absolute path beside this program, whatever the folder and argv[0].
  const auto here = std::filesystem::current_path();
  std::filesystem::current_path("/");
  const auto beside = plugin_beside(std::filesystem::read_symlink("/proc/self/exe"));
  std::string said;
  try {
    cuda_plugin();
  } catch (const CudaError& error) {
    said = error.what();
  }
  std::filesystem::current_path(here);
  EXPECT_NE(said.find("needs " + beside.string() + ", which is not there"), std::string::npos)
      << said;
}

TEST(CudaPlugin, RefusalsAreOneSentenceEach) {
  cuda::DeviceInfo info;
  info.runtime_version = 13000;
  EXPECT_NE(cuda_refusal(info, 0).find("no driver is installed"), std::string::npos);
  info.driver_version = 12040;
  EXPECT_NE(cuda_refusal(info, 0).find("driver is too old: it supports CUDA 12.4 and this backend "
                                       "needs 13.0"),
            std::string::npos);
  info.driver_version = 13010;
  EXPECT_NE(cuda_refusal(info, 0).find("sees none"), std::string::npos);
  info.count = 1;
  info.major = 7;
  info.minor = 5;
  EXPECT_NE(cuda_refusal(info, 0).find("compute capability is 7.5"), std::string::npos);
  EXPECT_NE(cuda_refusal(info, 1).find("no GPU 1"), std::string::npos);
  info.major = 8;
  info.minor = 0;
  EXPECT_EQ(cuda_refusal(info, 0), "");
}

}  // namespace
}  // namespace dsfp4::ops
