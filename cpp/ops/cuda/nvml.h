// The driver's management library: the memory of a device before there is a context on it. Its
// functions are a table, so that tests have a driver of their own. No CUDA in here.
//
// Facts of MIG (NVIDIA's MIG User Guide, NVML API Reference): a GPU in MIG mode is cut into slices,
// of which a process sees one, as its only device, whose PCI bus is the whole GPU's. NVML's handle
// of that bus is the whole GPU, and its memory is that of all slices; a slice has a handle of its
// own, by the UUID that CUDA_VISIBLE_DEVICES takes, "MIG-...".
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace dsfp4::ops::cuda {

struct NvmlMemory {
  unsigned long long total, free, used;
};

/// NVML's functions; each returns 0 where it worked. Null: this driver does not have it.
struct Nvml {
  int (*init)() = nullptr;
  int (*shutdown)() = nullptr;
  int (*find_by_bus)(const char* bus, void** device) = nullptr;
  int (*find_by_uuid)(const char* uuid, void** device) = nullptr;
  int (*mig_mode)(void* device, unsigned* current, unsigned* pending) = nullptr;
  int (*memory)(void* device, NvmlMemory* memory) = nullptr;

  bool usable() const {
    return init != nullptr && shutdown != nullptr && find_by_bus != nullptr && memory != nullptr;
  }
};

/// "MIG-01234567-89ab-cdef-0123-456789abcdef"
inline std::string mig_name(const std::array<unsigned char, 16>& uuid) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string name = "MIG-";
  for (std::size_t i = 0; i < uuid.size(); ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) name += '-';
    name += kDigits[uuid[i] >> 4];
    name += kDigits[uuid[i] & 15];
  }
  return name;
}

/// Device `index` of a list like CUDA_VISIBLE_DEVICES; empty if there is none.
inline std::string_view visible_device(std::string_view list, int index) {
  for (; index > 0; --index) {
    const std::size_t comma = list.find(',');
    if (comma == list.npos) return {};
    list.remove_prefix(comma + 1);
  }
  return list.substr(0, list.find(','));
}

/// Free bytes of the device on PCI bus `bus` whose UUID is `uuid`; `visible` is what the
/// environment calls it, or empty. 0 where that is not known: of a slice that cannot be found,
/// never those of the whole GPU.
inline std::uint64_t free_without_context(const Nvml& nvml, const char* bus,
                                          const std::array<unsigned char, 16>& uuid,
                                          std::string_view visible) {
  if (!nvml.usable() || nvml.init() != 0) return 0;
  const auto find = [&]() -> void* {
    void* device = nullptr;
    if (nvml.find_by_bus(bus, &device) != 0) return nullptr;
    unsigned current = 0;
    unsigned pending = 0;
    const bool mig =
        nvml.mig_mode != nullptr && nvml.mig_mode(device, &current, &pending) == 0 && current != 0;
    if (!mig) return device;
    // The runtime gives a slice's UUID or the whole GPU's, which names no slice.
    if (nvml.find_by_uuid == nullptr) return nullptr;
    if (nvml.find_by_uuid(mig_name(uuid).c_str(), &device) == 0) return device;
    if (!visible.starts_with("MIG-")) return nullptr;
    return nvml.find_by_uuid(std::string(visible).c_str(), &device) == 0 ? device : nullptr;
  };
  void* const device = find();
  NvmlMemory info{};
  const std::uint64_t free =
      device != nullptr && nvml.memory(device, &info) == 0 ? std::uint64_t{info.free} : 0;
  nvml.shutdown();
  return free;
}

}  // namespace dsfp4::ops::cuda
