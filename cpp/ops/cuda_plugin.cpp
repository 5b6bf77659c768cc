#include "ops/cuda_plugin.h"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <dlfcn.h>
#include <string>
#include <string_view>
#include <system_error>

#include "base/files.h"
#include "dsfp4/error.h"

namespace dsfp4::ops {
namespace {

constexpr const char* kLibrary = "libdsfp4_cuda.so";
constexpr int kOldestMajor = 8;  // Ampere

// The library or program that this code is in. dladdr() may only know a name that a search found,
// or one that was relative to a folder that the process has left.
std::filesystem::path own_file() {
  const auto here = reinterpret_cast<std::uintptr_t>(&cuda_plugin);
  const std::string maps = read_whole_file("/proc/self/maps");
  const char* const last = maps.data() + maps.size();
  for (const char* line = maps.data(); line < last;) {  // first-end rights ... name
    const char* const line_end = std::find(line, last, '\n');
    std::uintptr_t first = 0;
    std::uintptr_t end = 0;
    const char* const dash = std::from_chars(line, line_end, first, 16).ptr;
    if (dash < line_end) std::from_chars(dash + 1, line_end, end, 16);
    const char* const name = std::find(line, line_end, '/');
    if (first <= here && here < end && name < line_end) return std::string(name, line_end);
    line = line_end + 1;
  }
  throw CudaError(
      "device 'cuda' needs /proc/self/maps, to find its library beside this one; use "
      "device 'cpu', or set DSFP4_CUDA_PLUGIN to the path of " +
      std::string(kLibrary));
}

bool is_there(const std::filesystem::path& path) {
  std::error_code ignored;  // where it cannot be looked at, it cannot be loaded either
  return std::filesystem::exists(path, ignored);
}

std::filesystem::path plugin_path() {
  const char* named = std::getenv("DSFP4_CUDA_PLUGIN");
  if (named == nullptr || *named == '\0') return plugin_beside(own_file());
  const std::filesystem::path path = named;
  return path.has_parent_path() ? path : "." / path;  // dlopen searches for what has no folder
}

const cuda::Plugin& load_plugin() {
  const std::filesystem::path path = plugin_path();
  if (!is_there(path)) {
    throw CudaError("device 'cuda' needs " + path.string() +
                    ", which is not there: this build of dsfp4 has no CUDA backend; use device "
                    "'cpu', or build dsfp4 anew where nvcc is (pip install "
                    "-Ccmake.define.DSFP4_CUDA=ON, or cmake -DDSFP4_CUDA=ON)");
  }
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw CudaError("the CUDA backend " + path.string() + " cannot be loaded: " + dlerror());
  }
  const auto entry = reinterpret_cast<cuda::PluginEntry>(dlsym(library, cuda::kPluginEntry));
  const cuda::Plugin* plugin = entry == nullptr ? nullptr : entry(cuda::kAbiVersion);
  if (plugin == nullptr || plugin->bytes != sizeof(cuda::Plugin)) {
    throw CudaError("the CUDA backend " + path.string() +
                    " is of another version of dsfp4; install both from one wheel");
  }
  return *plugin;  // never unloaded: the runtime in it has threads and handlers of its own
}

// The variable that may hide a GPU, or name a slice of one that is not there.
std::string visible_devices() {
  const char* list = std::getenv("CUDA_VISIBLE_DEVICES");
  return list == nullptr ? "" : std::string(" (CUDA_VISIBLE_DEVICES is '") + list + "')";
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

std::filesystem::path plugin_beside(const std::filesystem::path& library) {
  const std::filesystem::path folder = library.parent_path();
  const std::filesystem::path below = folder / "lib" / kLibrary;
  return is_there(below) ? below : folder / kLibrary;
}

const cuda::Plugin& cuda_plugin() {
  static const cuda::Plugin& plugin = load_plugin();  // a failed load is tried again
  return plugin;
}

std::string cuda_refusal(const cuda::DeviceInfo& info, int index) {
  if (info.driver_version == 0) {
    return "device 'cuda' needs an NVIDIA GPU and its driver, and no driver is installed; use "
           "device 'cpu'";
  }
  if (info.driver_version / 1000 < info.runtime_version / 1000) {
    return "the NVIDIA driver is too old: it supports CUDA " + version_text(info.driver_version) +
           " and this backend needs " + version_text(info.runtime_version / 1000 * 1000) +
           "; update the driver or use device 'cpu'";
  }
  if (info.count == 0) {
    return "device 'cuda' needs an NVIDIA GPU, and the driver sees none" + visible_devices() +
           "; use device 'cpu'";
  }
  if (index >= info.count) {
    return "there is no GPU " + std::to_string(index) + "; the driver sees " +
           std::to_string(info.count) + ", counted from 0" + visible_devices();
  }
  if (info.major < kOldestMajor) {
    return "the GPU " + std::string(info.name) + " is too old: its compute capability is " +
           std::to_string(info.major) + "." + std::to_string(info.minor) +
           " and this backend needs 8.0 (Ampere) or later; use device 'cpu'";
  }
  return {};
}

cuda::DeviceInfo cuda_device(int index) { return cuda_device(cuda_plugin(), index); }

cuda::DeviceInfo cuda_device(const cuda::Plugin& plugin, int index) {
  const cuda::DeviceInfo info = probe_cuda(plugin, index);
  const std::string refusal = cuda_refusal(info, index);
  if (!refusal.empty()) throw CudaError(refusal);
  return info;
}

cuda::DeviceInfo probe_cuda(const cuda::Plugin& plugin, int index) {
  cuda::DeviceInfo info;
  if (!plugin.probe(index, &info)) {
    const cuda::Failure& failure = *plugin.failure();
    throw CudaError(failure.problem, failure.code, failure.call, failure.source, failure.line);
  }
  return info;
}

bool cuda_kernels_are_portable() {
  const char* value = std::getenv("DSFP4_CUDA_KERNELS");
  const std::string_view word = value == nullptr ? "" : value;
  if (word.empty() || word == "portable") return !word.empty();
  throw ParameterError("DSFP4_CUDA_KERNELS",
                       "must be 'portable' or empty, not '" + std::string(word) + "'");
}

}  // namespace dsfp4::ops
