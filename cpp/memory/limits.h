// What the machine has, and the limit that follows from it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/cgroups.h"

namespace dsfp4::memory {

/// In bytes.
struct MachineMemory {
  std::uint64_t total = 0;      // of the machine, or of the control group if that is less
  std::uint64_t available = 0;  // can still be taken without swapping
  std::uint64_t process = 0;    // resident in this process now
};

/// Reads /proc and the limits of the control groups (versions 1 and 2) that this process is in, its
/// own and those above, of which the tightest counts. `available` and `total` are the largest
/// number where neither can be read.
MachineMemory machine_memory();

/// The same of a system that describes itself elsewhere.
MachineMemory machine_memory_of(const SystemRoots& roots);

/// Bytes that the system can still give without swapping; see MachineMemory::available.
std::size_t available_memory();

/// The limit for a process that was given none: what it has and what is available, less room for
/// the rest of the machine to breathe (5 % of the total, at most 2 GB).
std::uint64_t default_ram_limit(const MachineMemory& machine) noexcept;

/// Kept below a limit for what is not counted byte for byte: stacks, headers, the allocator.
inline constexpr std::uint64_t kUncountedBytes = 128'000'000;

}  // namespace dsfp4::memory
