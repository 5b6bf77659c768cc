#include "memory/limits.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <limits>
#include <span>
#include <string>
#include <string_view>

#include "base/files.h"

namespace dsfp4::memory {
namespace {

constexpr std::uint64_t kUnknown = std::numeric_limits<std::uint64_t>::max();

// The number after `key` in `file` (the first word if key is empty); kUnknown if there is none
// ("max").
std::uint64_t number_in(const std::filesystem::path& file, std::string_view key) {
  const std::string text = read_whole_file(file);
  bool found = key.empty();
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t begin = text.find_first_not_of(" \t\n", at);
    if (begin == std::string::npos) break;
    at = std::min(text.find_first_of(" \t\n", begin), text.size());
    if (found) {
      const bool digits = text[begin] >= '0' && text[begin] <= '9';
      return digits ? std::strtoull(text.c_str() + begin, nullptr, 10) : kUnknown;
    }
    found = std::string_view(text).substr(begin, at - begin) == key;
  }
  return kUnknown;
}

// The files in which a version of control groups says what a group may have and has.
struct GroupFiles {
  std::span<const char* const> limits;  // the least counts
  const char* usage;
  std::span<const char* const> cache;  // in memory.stat, of the group and those below it
};

// Above memory.high the system does not refuse, but slows the group down until it gives memory
// back.
constexpr const char* kLimits2[] = {"memory.max", "memory.high"};
constexpr const char* kCache2[] = {"inactive_file", "active_file"};
constexpr GroupFiles kVersion2{kLimits2, "memory.current", kCache2};
constexpr const char* kLimits1[] = {"memory.limit_in_bytes"};
constexpr const char* kCache1[] = {"total_inactive_file", "total_active_file"};
constexpr GroupFiles kVersion1{kLimits1, "memory.usage_in_bytes", kCache1};

// Lowers `memory` to what one control group leaves to all that are in it. Page cache counts as used
// there, but is given up before anything swaps; the kernel's MemAvailable counts it so, too.
void apply_group(const std::filesystem::path& group, const GroupFiles& files,
                 MachineMemory& memory) {
  std::uint64_t limit = kUnknown;
  for (const char* file : files.limits) limit = std::min(limit, number_in(group / file, ""));
  if (limit == kUnknown) return;
  memory.total = std::min(memory.total, limit);
  const std::uint64_t used = number_in(group / files.usage, "");
  if (used == kUnknown) return;
  std::uint64_t kept = used;
  for (const char* key : files.cache) {
    const std::uint64_t cache = number_in(group / "memory.stat", key);
    if (cache != kUnknown) kept -= std::min(kept, cache);
  }
  memory.available = std::min(memory.available, limit > kept ? limit - kept : 0);
}

std::uint64_t kibibytes(std::uint64_t number) {
  return number == kUnknown ? number : number * 1024;
}

}  // namespace

MachineMemory machine_memory() { return machine_memory_of({}); }

MachineMemory machine_memory_of(const SystemRoots& roots) {
  MachineMemory memory;
  memory.total = kibibytes(number_in(roots.proc / "meminfo", "MemTotal:"));
  memory.available = kibibytes(number_in(roots.proc / "meminfo", "MemAvailable:"));
  const std::uint64_t resident = kibibytes(number_in(roots.proc / "self/status", "VmRSS:"));
  memory.process = resident == kUnknown ? 0 : resident;
  // Groups above limit this one too, and what its siblings have taken of theirs is gone.
  for (const auto& group : control_groups(roots, "")) apply_group(group, kVersion2, memory);
  for (const auto& group : control_groups(roots, "memory")) apply_group(group, kVersion1, memory);
  return memory;
}

std::size_t available_memory() { return machine_memory().available; }

std::uint64_t default_ram_limit(const MachineMemory& machine) noexcept {
  if (machine.available == kUnknown) return kUnknown;
  const std::uint64_t room = std::min<std::uint64_t>(machine.total / 20, 2'000'000'000);
  const std::uint64_t most = machine.process + machine.available;
  return most > room ? most - room : 0;
}

}  // namespace dsfp4::memory
