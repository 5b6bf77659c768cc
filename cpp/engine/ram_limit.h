// Holds a load against the limit of RAM before anything is taken.
#pragma once

#include <cstdint>

#include "memory/limits.h"

namespace dsfp4::engine {

/// What will be taken, in bytes.
struct RamNeeds {
  std::uint64_t weights = 0;
  std::uint64_t kv_cache = 0;
  std::uint64_t scratch = 0;
  std::uint64_t staging = 0;  // of the reader

  std::uint64_t total() const noexcept { return weights + kv_cache + scratch + staging; }
};

/// The least `ram_limit` for `needs`: what the process has already, what is to be taken, and
/// memory::kUncountedBytes.
std::uint64_t ram_floor(const RamNeeds& needs, const memory::MachineMemory& machine) noexcept;

/// `ram_limit` in bytes, 0 for the default. Throws MemoryLimitError with the floor if the limit is
/// below it, or if the machine would have to swap; warns through the log of a limit that is beyond
/// what is available now.
void check_ram(std::uint64_t ram_limit, const RamNeeds& needs,
               const memory::MachineMemory& machine);

/// Refuses results of forward() that take `bytes` with MemoryLimitError, if that is more than
/// `ram_limit` (in bytes, 0: none) leaves or the machine has. `planned` is what the process had
/// before the load and what that reserved: all of it will be touched. memory::kUncountedBytes are
/// always there.
void check_result(std::uint64_t bytes, std::uint64_t ram_limit, std::uint64_t planned,
                  const memory::MachineMemory& machine);

}  // namespace dsfp4::engine
