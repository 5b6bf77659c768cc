#include "engine/copies.h"

#include <array>
#include <chrono>
#include <cstdint>
#include <exception>

#include "base/log.h"
#include "base/seconds.h"
#include "memory/arena.h"

namespace dsfp4::engine {
namespace {

/// Waits at the end for what a device still does.
class Settled {
 public:
  explicit Settled(ops::Device& device) : device_(device) {}
  ~Settled() {
    try {
      device_.synchronize();
    } catch (const std::exception& error) {  // it does nothing any more
      log(LogLevel::kInfo, error.what());
    }
  }
  Settled(const Settled&) = delete;
  Settled& operator=(const Settled&) = delete;

 private:
  ops::Device& device_;
};

}  // namespace

double copy_rate(ops::Device& device, CopyWay way, std::span<std::byte* const> blocks,
                 std::size_t bytes, double seconds, const Poll& poll) {
  memory::Arena arena(memory::Arena::padded(bytes), "the copies that are timed", device.memory());
  const DevicePtr<std::byte> place = arena.take(bytes);
  const std::array made = {device.make_event(), device.make_event()};
  const Settled settled(device);
  const ops::Queue line = way == CopyWay::kIn ? ops::Queue::kUpload : ops::Queue::kDownload;
  std::uint64_t queued = 0;
  const auto queue = [&] {
    std::byte* const block = blocks[queued % blocks.size()];
    if (way == CopyWay::kIn) {
      device.copy_in(line, block, place, bytes);
    } else {
      device.copy_out(line, place, block, bytes);
    }
    device.record(line, made[queued++ % made.size()]);
  };
  queue();
  device.wait_for(made[0]);  // the first one pays for what is new
  const auto start = std::chrono::steady_clock::now();
  std::uint64_t done = 0;
  queue();
  do {
    ask(poll);
    queue();
    device.wait_for(made[queued % made.size()]);  // the one before it
    ++done;
  } while (seconds_since(start) < seconds);
  return static_cast<double>(done * bytes) / seconds_since(start);
}

}  // namespace dsfp4::engine
