// The machine, as the core knows it, for `dsfp4 doctor`.
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <optional>
#include <string>

#include <nanobind/nanobind.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "base/cores.h"
#include "bindings/bindings.h"
#include "bindings/gil.h"
#include "engine/gpu_rates.h"
#include "memory/limits.h"
#include "ops/cuda_plugin.h"
#include "storage/reader.h"

namespace dsfp4::bindings {
namespace {

namespace nb = nanobind;
namespace fs = std::filesystem;

std::optional<std::uint64_t> known(std::uint64_t bytes) {
  if (bytes == std::numeric_limits<std::uint64_t>::max()) return std::nullopt;
  return bytes;
}

nb::dict machine_memory(const fs::path& proc, const fs::path& sys) {
  const memory::MachineMemory memory = memory::machine_memory_of({proc, sys});
  nb::dict result;
  result["total"] = known(memory.total);
  result["available"] = known(memory.available);
  result["ram_limit"] = known(memory::default_ram_limit(memory));
  return result;
}

nb::dict machine_cores(const fs::path& proc, const fs::path& sys) {
  const Cores cores = find_cores({proc, sys});
  nb::dict result;
  result["physical"] = cores.physical.size();
  result["all"] = cores.all;
  result["quota"] = std::isfinite(cores.quota) ? std::optional(cores.quota) : std::nullopt;
  result["threads"] = cores.threads();
  return result;
}

std::optional<std::string> uring_problem() {
  const std::string problem = storage::uring_problem();
  return problem.empty() ? std::nullopt : std::optional(problem);
}

nb::dict probe_cuda() {
  const ops::cuda::DeviceInfo info = ops::probe_cuda(ops::cuda_plugin(), 0);
  nb::dict result;
  result["gpus"] = info.count;
  result["name"] = std::string(info.name);
  result["memory"] = info.total_bytes;
  result["driver_cuda"] = info.driver_version;
  result["plugin_cuda"] = info.runtime_version;
  return result;
}

nb::dict measure_gpu(double seconds) {
  engine::GpuRates rates;
  {
    const ReleasedGil released;
    rates = engine::measure_gpu(0, seconds);
  }
  nb::dict result;
  result["copy_in"] = rates.copy_in;
  result["copy_out"] = rates.copy_out;
  result["read"] = rates.read;
  return result;
}

}  // namespace

void bind_machine(nb::module_& m) {
  m.def("machine_memory", &machine_memory, nb::arg("proc"), nb::arg("sys"),
        "Bytes of RAM that a system has which describes itself in these folders, by its control "
        "groups too: `total`, `available`, and `ram_limit`, which a model keeps to by default. "
        "None: not known.");
  m.def("machine_cores", &machine_cores, nb::arg("proc"), nb::arg("sys"),
        "Processors of this process: `physical` cores, `all` if no other is online, `quota` of the "
        "control groups or None, `threads` by default.");
  m.def("uring_problem", &uring_problem, "Why io_uring cannot be used here; None if it can.");
  m.def("probe_cuda", &probe_cuda,
        "The `gpus` that the driver sees, `name` and bytes of `memory` of the first one, which "
        "may be a slice of a GPU (MIG), '' and 0 without one; and the CUDA that the driver "
        "supports and that the plugin is built with, 13000 for 13.0 and 0 for none. CudaError "
        "without a plugin.");
  m.def("measure_gpu", &measure_gpu, nb::arg("seconds"),
        "Bytes/s: `copy_in` from pinned RAM to GPU 0, `copy_out` back, each for some seconds; "
        "`read` of its memory by the GPU. Takes 1.1 GB of VRAM and 0.3 GB of RAM.");
}

}  // namespace dsfp4::bindings
