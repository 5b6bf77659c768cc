#include "engine/gpu_rates.h"

#include <array>
#include <cstring>

#include "base/device_access.h"
#include "engine/copies.h"
#include "memory/arena.h"
#include "ops/cuda_plugin.h"

namespace dsfp4::engine {
namespace {

constexpr std::size_t kReadBytes = std::size_t{1} << 30;
constexpr std::size_t kBlockBytes = std::size_t{32} << 20;
constexpr std::size_t kBlocks = 8;  // more than the processor's caches hold

}  // namespace

GpuRates measure_gpu(int index, double seconds) {
  const ops::cuda::Plugin& plugin = ops::cuda_plugin();
  ops::cuda_device(index);  // says why it cannot be used
  ops::CudaDevice device(plugin, index, 0);
  GpuRates rates;
  {
    memory::Arena ram(kBlocks * kBlockBytes, "the copies that are timed", device.staging());
    std::array<std::byte*, kBlocks> blocks{};
    for (std::byte*& block : blocks) {
      block = memory::on_host(device.staging(), ram.take(kBlockBytes));
      std::memset(block, 1, kBlockBytes);
    }
    rates.copy_in = copy_rate(device, CopyWay::kIn, blocks, kBlockBytes, seconds);
    rates.copy_out = copy_rate(device, CopyWay::kOut, blocks, kBlockBytes, seconds);
  }
  memory::Arena vram(kReadBytes, "the reads that are timed", device.memory());
  CudaTimer timer(plugin, device);
  rates.read = static_cast<double>(kReadBytes) /
               read_seconds(plugin, device, timer, vram.take(kReadBytes), kReadBytes);
  return rates;
}

double read_seconds(const ops::cuda::Plugin& plugin, ops::CudaDevice& device, CudaTimer& timer,
                    DevicePtr<const std::byte> memory, std::size_t bytes) {
  memory::Arena arena(memory::Arena::padded(256), "the result of reads", device.memory());
  std::byte* const sink = DeviceAccess::address(arena.take(256));
  return timer.seconds_of(1, [&](int) {
    ops::cuda_check(plugin,
                    plugin.read_all(device.opened(), DeviceAccess::address(memory), bytes, sink));
  });
}

}  // namespace dsfp4::engine
