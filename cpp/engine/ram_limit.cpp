#include "engine/ram_limit.h"

#include <algorithm>
#include <cstdio>
#include <string>

#include "base/log.h"
#include "dsfp4/error.h"

namespace dsfp4::engine {
namespace {

constexpr const char* kPurpose =
    "the whole model with its KV cache, its buffers and what this process has already";

std::string gigabytes(std::uint64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f GB", static_cast<double>(bytes) * 1e-9);
  return text;
}

}  // namespace

std::uint64_t ram_floor(const RamNeeds& needs, const memory::MachineMemory& machine) noexcept {
  return machine.process + needs.total() + memory::kUncountedBytes;
}

void check_ram(std::uint64_t ram_limit, const RamNeeds& needs,
               const memory::MachineMemory& machine) {
  const std::uint64_t floor = ram_floor(needs, machine);
  const std::uint64_t limit = ram_limit > 0 ? ram_limit : memory::default_ram_limit(machine);
  if (floor > limit) {
    throw MemoryLimitError(kPurpose, floor, limit,
                           ram_limit > 0 ? "raise ram_limit, or lower max_context"
                                         : "free some memory, lower max_context, or set ram_limit "
                                           "if the machine can spare more");
  }
  if (machine.available >= limit) return;  // also where it is not known
  const std::uint64_t most = machine.process + machine.available;
  if (floor > most) {
    throw MemoryLimitError(kPurpose, floor, most,
                           "the limit allows it, but the machine would have to swap: free some "
                           "memory first, or lower max_context");
  }
  if (limit > most) {
    log(LogLevel::kWarning, "ram_limit is " + gigabytes(limit) + ", but only " + gigabytes(most) +
                                " can be had without swapping; a machine that swaps is many times "
                                "slower");
  }
}

void check_result(std::uint64_t bytes, std::uint64_t ram_limit, std::uint64_t planned,
                  const memory::MachineMemory& machine) {
  const std::uint64_t process = std::max(machine.process, planned);
  const std::uint64_t untouched = process - machine.process;
  std::uint64_t room = machine.available - std::min(machine.available, untouched);
  if (ram_limit > 0) room = std::min(room, ram_limit - std::min(ram_limit, process));
  room = std::max(room, memory::kUncountedBytes);
  if (bytes <= room) return;
  throw MemoryLimitError("the results of forward() for all tokens", bytes, room,
                         "run fewer tokens at a time (dsfp4 eval: a smaller --window), or take the "
                         "logits with forward_windows()");
}

}  // namespace dsfp4::engine
