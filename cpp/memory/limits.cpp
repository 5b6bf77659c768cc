#include "memory/limits.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <limits>
#include <string>
#include <string_view>
#include <system_error>
#include <unistd.h>

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

// Lowers `memory` to what one control group leaves. Page cache counts as used there, but is given
// up before anything swaps.
void apply_group(const std::filesystem::path& group, const char* limit_file, const char* usage_file,
                 const char* cache_key, MachineMemory& memory) {
  const std::uint64_t limit = number_in(group / limit_file, "");
  const std::uint64_t used = number_in(group / usage_file, "");
  if (limit >= memory.total || used == kUnknown) return;  // version 1 writes 'none' as 2^63
  const std::uint64_t cache = number_in(group / "memory.stat", cache_key);
  const std::uint64_t kept = cache == kUnknown ? used : used - std::min(used, cache);
  memory.total = limit;
  memory.available = std::min(memory.available, limit > kept ? limit - kept : 0);
}

// This process's path in the hierarchy whose line in /proc/self/cgroup begins with `start`, or in
// which `controller` is; empty if there is none.
std::string group_path(const std::string& controller) {
  const std::string text = read_whole_file("/proc/self/cgroup");
  for (std::size_t at = 0, end = 0; at < text.size(); at = end + 1) {
    end = std::min(text.find('\n', at), text.size());
    const std::string line = text.substr(at, end - at);
    const std::size_t first = line.find(':');
    const std::size_t second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string names = "," + line.substr(first + 1, second - first - 1) + ",";
    if (controller.empty() ? names == ",," : names.find("," + controller + ",") != names.npos) {
      return line.substr(second + 1);
    }
  }
  return "";
}

// A group may see itself as the root, and groups above it limit it too.
void apply_groups(const std::filesystem::path& root, const std::string& own, const char* limit_file,
                  const char* usage_file, const char* cache_key, MachineMemory& memory) {
  std::filesystem::path group = root / std::filesystem::path(own).relative_path();
  for (;;) {
    apply_group(group, limit_file, usage_file, cache_key, memory);
    if (group == root || group.string().size() <= root.string().size()) break;
    group = group.parent_path();
  }
  apply_group(root, limit_file, usage_file, cache_key, memory);
}

std::uint64_t kibibytes(std::uint64_t number) {
  return number == kUnknown ? number : number * 1024;
}

}  // namespace

MachineMemory machine_memory() {
  MachineMemory memory;
  memory.total = kibibytes(number_in("/proc/meminfo", "MemTotal:"));
  memory.available = kibibytes(number_in("/proc/meminfo", "MemAvailable:"));
  const std::uint64_t resident = kibibytes(number_in("/proc/self/status", "VmRSS:"));
  memory.process = resident == kUnknown ? 0 : resident;
  apply_groups("/sys/fs/cgroup", group_path(""), "memory.max", "memory.current", "inactive_file",
               memory);
  apply_groups("/sys/fs/cgroup/memory", group_path("memory"), "memory.limit_in_bytes",
               "memory.usage_in_bytes", "total_inactive_file", memory);
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
