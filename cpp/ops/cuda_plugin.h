// The one place that loads libdsfp4_cuda.so: the rest of the core asks here for its table.
#pragma once

#include <filesystem>
#include <string>

#include "ops/cuda/abi.h"

namespace dsfp4::ops {

/// The plugin's table, loaded at the first call and kept: from the file that DSFP4_CUDA_PLUGIN
/// names, else plugin_beside() the library or program that this code is in. Nothing is searched
/// for. Throws CudaError with one clear sentence if it is not there, is of another version, or
/// cannot be loaded.
const cuda::Plugin& cuda_plugin();

/// What device `index` is. Throws CudaError with one clear sentence if there is no driver, no GPU,
/// no GPU of this index, one too old (compute capability under 8.0), or too old a driver.
cuda::DeviceInfo cuda_device(int index);
cuda::DeviceInfo cuda_device(const cuda::Plugin& plugin, int index);

/// The GPU that is there, fit for use or not: for cuda_refusal(). Throws CudaError if the driver
/// fails.
cuda::DeviceInfo probe_cuda(const cuda::Plugin& plugin, int index);

/// Whether the environment's DSFP4_CUDA_KERNELS is "portable": only kernels that every GPU can run.
/// Throws ParameterError if it is something else; empty is as if it were not there.
bool cuda_kernels_are_portable();

/// The plugin of the file `library`: in the folder lib/ beside it, as in the Python package, where
/// one is there, else beside it. Others may own the folders above. For cuda_plugin() and its tests.
std::filesystem::path plugin_beside(const std::filesystem::path& library);

/// The sentence why `info` cannot be used; empty if it can. For cuda_device() and its tests.
std::string cuda_refusal(const cuda::DeviceInfo& info, int index);

}  // namespace dsfp4::ops
